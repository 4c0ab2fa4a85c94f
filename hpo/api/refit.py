"""`hpo refit`: turn the winner of a search, any trial, or a recipe into a submission model.

What needs torch or Optuna is imported in functions, so that a wrong name is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from core.config import MOST_EPOCHS
from core.weights import weights_in
from hpo.api.options import ConfirmOptions, RefitOptions
from hpo.confirmation.result import Confirmation, dump, identity_of, is_current, read_confirmation
from hpo.errors import SpaceError, StudyError
from hpo.paths import RecipePaths, StudyPaths, TrainingPaths, refit_label
from hpo.reporter import Reporter, Silent
from hpo.search.interrupts import Interrupts
from hpo.space.grammar import SMALLEST, cost_bound
from hpo.storage.atomic import exclusive
from hpo.study import find_study

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core.config import TrainConfig
    from hpo.api.length import Climbing
    from hpo.space import Recipe
    from hpo.study import Study
    from hpo.submission.decision import Forced
    from hpo.submission.evidence import Evidence
    from hpo.submission.ladder import Ladder
    from hpo.submission.peers import Library
    from hpo.submission.refit import Refitted

BEST = "best"

# Networks of an ensemble, as `data.folds` and a bundle allow.
FEWEST, MOST = 2, 20
# As `core.tta.VIEWS` and `submission.decision.FORMS`, which are imported too late.
_VIEWS, _FORMS = ("none", "flip", "shift", "flip_shift"), ("one", "uniform_soup", "greedy_soup", "ensemble")
_OF_CONFIGURATIONS = ("one", "ensemble")

AUTO = "auto"
"""Value of `--epochs`."""


@dataclass(frozen=True)
class RefitResult:
    """The outcome of `refit`."""

    study: Study | None
    """None if a recipe was refitted."""
    metric: str
    refitted: Refitted
    confirmation: Confirmation | None
    """The confirmation that the configuration was chosen by."""
    labels: Tensor = field(repr=False)
    """(N,) int64: labels of the images outside the test set."""
    test_images: int


@dataclass(frozen=True)
class _Choice:
    """The configuration to refit."""

    name: str
    """For example `trial 12`, or `recipe NAME`."""
    label: str
    """Start of the name of the bundle's folder."""
    number: int | None
    """Of the trial; None if no trial has this configuration."""
    config: TrainConfig
    epochs: int | None
    """Of the training on all images; None for those kept by the training before."""
    kept: TrainingPaths | None = None
    """Folder with weights of the configuration."""
    recipe: str | None = None
    confirmation: Confirmation | None = None
    """The confirmation that chose it."""
    ladder: Ladder | None = None
    """The ladder that chose its length."""
    length: int | None = None
    """Epochs of the schedule of the training on all images, where the choices rest on another length."""


def refit(
    options: RefitOptions,
    reporter: Reporter | None = None,
    interrupts: Interrupts | None = None,
    *,
    left_s: Callable[[int], float] | None = None,
    length: int | None = None,
) -> RefitResult:
    """Retrain a trial or a recipe on training and validation images into a submission model, and open the test set.

    `best` is confirmed first, unless `options.confirm` is off, and then the length of its training is chosen.

    Args:
        left_s: Returns the seconds that are left for the choice of the length and the training on all images, which is
            shortened to fit, given how often each image passes a network when the model predicts; None without a limit.
        length: Epochs of the training on all images, without comparing lengths: the choices rest on the predictions of
            the searched length. None chooses the length.

    Raises:
        HpoError: There is no such study, trial or recipe, or it cannot be refitted.
        CoreError: The data, the network or the device cannot be used.
        KeyboardInterrupt: Stopped; the same call resumes from the last checkpoint.
    """
    reporter, interrupts = reporter or Silent(), interrupts or Interrupts()
    with interrupts.let_through():
        _check_networks(options)
        _check_forced(options)
        _epochs(options)
        recipe = None if _is_trial(options) else _recipe(options)
    if recipe is not None:
        with weights_in(options.weights):
            return _refit_recipe(recipe, options, reporter, interrupts, left_s)
    with interrupts.let_through():
        study = find_study(options.study, storage_url=options.storage)
        from core.runtime import select_device
        from hpo.api.common import weights_of
        from hpo.submission.onnx_export import check_onnx

    device = select_device(options.device)
    if options.onnx:
        check_onnx()
    with weights_in(weights_of(study, options.weights)):
        choice = replace(_choose(study, options, reporter, interrupts), length=length)
        with _exclusive(study.paths, choice, options):
            return _refitted(study, choice, options, device, reporter, interrupts, left_s)


def _label(choice: _Choice, options: RefitOptions) -> str:
    return refit_label(choice.label, options.folds, options.members, options.ensemble)


def _exclusive(paths: StudyPaths, choice: _Choice, options: RefitOptions) -> AbstractContextManager[None]:
    """Two processes would overwrite each other's checkpoints."""
    label = _label(choice, options)
    return exclusive(paths.refit_lock(label), f"{paths.refit(label)} is being made")


def _refitted(
    study: Study,
    choice: _Choice,
    options: RefitOptions,
    device: torch.device,
    reporter: Reporter,
    interrupts: Interrupts,
    left_s: Callable[[int], float] | None,
) -> RefitResult:
    from core.runtime import describe_device
    from hpo.api.common import open_dataset
    from hpo.api.length import Climbing
    from hpo.search.training import without_failed_graphs

    config = choice.config
    _forced(options, config)  # raises before anything is trained
    study.files.use_store(None)
    if choice.number is not None:
        study.files.fetch_trial(choice.number, folds=config.data.folds or 1)
    dataset = open_dataset(config.data, options.data or study.data_path, skip_broken=study.skip_broken)
    study.check_data(dataset)
    study.check_sources(config)
    climbing = Climbing(study.paths, study.metric, dataset, device, reporter, interrupts, study.settings, left_s)
    choice = _at_length(choice, options, climbing, study)
    reporter.say(
        f"refitting {choice.name} of study {study.name}{_networks(options, choice.config)}; {describe_device(device)}"
    )
    evidence = _evidence(choice, options, climbing, study)
    library = None if options.ensemble is None else _library(choice, options.ensemble, climbing, study, evidence)
    peers = () if library is None else library.peers
    with ExitStack() as stack:
        config, *others = (
            stack.enter_context(without_failed_graphs(study.settings, each))
            for each in (choice.config, *(peer.config for peer in peers))
        )
        peers = tuple(replace(peer, config=other) for peer, other in zip(peers, others, strict=True))
        library = None if library is None else replace(library, peers=peers)
        return _written(replace(choice, config=config), options, climbing, study, evidence, library)


def _written(
    choice: _Choice,
    options: RefitOptions,
    climbing: Climbing,
    study: Study | None = None,
    evidence: Evidence | None = None,
    library: Library | None = None,
) -> RefitResult:
    """Train the choice, and write its bundle."""
    from hpo.api.common import trainings
    from hpo.submission.refit import Training, refit, search_summary

    config, metric = choice.config, climbing.metric
    several = options.folds is not None or options.members is not None
    epochs = config.epochs if several and study is not None else choice.epochs
    longest = max(
        [choice.length or epochs or config.epochs, *(peer.epochs for peer in (library.peers if library else ()))]
    )
    with trainings(climbing.reporter, "refit", epochs=longest, metric=metric, interrupts=climbing.interrupts) as watch:
        refitted = refit(
            climbing.paths,
            number=choice.number,
            label=_label(choice, options),
            config=config,
            training=Training(
                epochs=epochs,
                length=choice.length,
                ensemble=options.folds,
                members=options.members,
                forced=_forced(options, config),
                evidence=evidence,
                library=library,
                left_s=climbing.left_s,
            ),
            dataset=climbing.dataset,
            metric=metric,
            device=climbing.device,
            recipe=choice.recipe,
            onnx=options.onnx,
            kept=choice.kept,
            confirmation=choice.confirmation,
            ladder=choice.ladder,
            search=None if study is None else search_summary(study),
            watch=watch,
        )
    return RefitResult(study, metric, refitted, choice.confirmation, climbing.dataset.labels, climbing.dataset.n_test)


def _is_trial(options: RefitOptions) -> bool:
    """Whether `best` or a number is given, and not a recipe; StudyError if other options do not fit it."""
    if (options.trial == SMALLEST) != (options.within is not None):
        raise StudyError(f"hpo refit {SMALLEST} --within 0.01: give both, or none")
    is_trial = options.trial == BEST or options.trial.isdecimal() or options.trial == SMALLEST
    is_trial = is_trial or cost_bound(options.trial) is not None
    if is_trial:
        for flag, given in (
            ("--set", options.set),
            ("--metric", options.metric),
            ("--skip-broken", options.skip_broken),
        ):
            if given:
                raise StudyError(
                    f"hpo refit {options.trial} {flag}: a trial is refitted as it was trained; give a recipe"
                )
    else:
        if options.ensemble is not None:
            raise StudyError(
                f"hpo refit {options.trial} --ensemble: a recipe has no other configurations; give `{BEST}` or the "
                "number of a trial, or --members for an ensemble of seeds"
            )
        for flag, given in (("--study", options.study), ("--storage", options.storage)):
            if given is not None:
                raise StudyError(
                    f"hpo refit {options.trial} {flag}: a recipe belongs to no study; give `{BEST}` or the number of a "
                    f"trial, or leave {flag} out"
                )
    return is_trial


def _refit_recipe(
    recipe: Recipe,
    options: RefitOptions,
    reporter: Reporter,
    interrupts: Interrupts,
    left_s: Callable[[int], float] | None,
) -> RefitResult:
    with interrupts.let_through():
        from core.data import folds
        from core.runtime import describe_device, select_device
        from hpo.api.common import open_dataset, report_data
        from hpo.api.length import Climbing
        from hpo.api.train import check_metric, training_paths
        from hpo.submission.onnx_export import check_onnx

        check_metric(options.metric)
        config, metric, device = recipe.config, options.metric or "accuracy", select_device(options.device)
        _forced(options, config)
        if options.onnx:
            check_onnx()
        dataset = open_dataset(config.data, options.data, skip_broken=options.skip_broken, reporter=reporter)
        splits = folds(dataset, _divided(config, options).data)
        report_data(dataset, splits, reporter)
    paths = RecipePaths(training_paths(recipe.name, config, metric, dataset).dir, dataset.fingerprint)
    climbing = Climbing(paths, metric, dataset, device, reporter, interrupts, None, left_s)
    choice = _Choice(f"recipe {recipe.name}", "recipe", None, config, None, recipe=recipe.name)
    with _exclusive(paths, choice, options):
        choice = _at_length(choice, options, climbing)
        reporter.say(f"refitting {choice.name}{_networks(options, choice.config)}; {describe_device(device)}")
        return _written(choice, options, climbing, evidence=_evidence(choice, options, climbing, None))


def _recipe(options: RefitOptions) -> Recipe:
    """Load the recipe; StudyError with all that can be given if there is none of this name."""
    from hpo.space import load_recipe
    from hpo.space.catalogue import find

    word = options.trial
    try:
        find(word, "recipe")
    except SpaceError as error:
        is_study = StudyPaths.of(word).study_yaml.is_file()
        why = f"{word} is a study: hpo refit {BEST} --study {word}" if is_study else f"{error}"
        raise StudyError(
            f"hpo refit {word}: give `{BEST}`, the number of a complete trial, or a recipe from hpo space list ({why})"
        ) from error
    return load_recipe(word, options.set)


def _divided(config: TrainConfig, options: RefitOptions) -> TrainConfig:
    """The configuration whose folds are trained before the decisions."""
    if options.folds is None and options.members is None:
        return config
    return config.override({"data.folds": options.folds})


def _check_networks(options: RefitOptions) -> None:
    several = {"--folds": options.folds, "--members": options.members, "--ensemble": options.ensemble}
    given = {flag: number for flag, number in several.items() if number is not None}
    if len(given) > 1:
        raise StudyError(
            f"{' and '.join(given)} each make several networks, by fold, seed or configuration; give one of them"
        )
    for flag, number in given.items():
        if options.single:
            raise StudyError(f"--single and {flag}: one network or several; give one of them")
        if not FEWEST <= number <= MOST:
            raise StudyError(
                f"{flag} {number}: an ensemble has {FEWEST} to {MOST} networks; leave it out for one, trained on all "
                "images"
            )


def _check_forced(options: RefitOptions) -> None:
    for flag, name, known in (("--views", options.views, _VIEWS), ("--form", options.form, _FORMS)):
        if name is not None and name not in known:
            raise StudyError(f"{flag} {name}: give one of {', '.join(known)}")
    if options.form is not None and options.members is None and options.ensemble is None:
        raise StudyError(
            f"--form {options.form}: it is the form of several networks; give their number by --members or --ensemble"
        )
    if options.ensemble is not None and options.form not in (None, *_OF_CONFIGURATIONS):
        raise StudyError(
            f"--form {options.form}: weights of different configurations have no mean; with --ensemble, give one of "
            f"{', '.join(_OF_CONFIGURATIONS)}"
        )


def _forced(options: RefitOptions, config: TrainConfig) -> Forced:
    """The choices that the user has made; StudyError if the configuration cannot have the average."""
    from hpo.search.held_out import known_average
    from hpo.submission.decision import Forced

    average = None if options.average is None else known_average(config, options.average)
    return Forced(average, options.views, options.form)


def _evidence(choice: _Choice, options: RefitOptions, climbing: Climbing, study: Study | None) -> Evidence | None:
    """The predictions of the ladder or the confirmation that chose the configuration.

    None if there are none, or if they lack the average or the views that the user has chosen.
    """
    from hpo.submission.evidence import of_confirmation, of_training

    labels, found = climbing.dataset.labels, None
    if choice.ladder is not None and choice.ladder.epochs != choice.ladder.searched:
        assert choice.kept is not None, "a longer training is kept"
        found = of_training(choice.kept, choice.config.data.folds or 1, labels)
    elif choice.confirmation is not None and choice.epochs is not None and study is not None:
        # Without epochs, others were asked for.
        found = of_confirmation(study, identity_of(dump(choice.config)), labels)
    forced = _forced(options, choice.config)
    return found if found is not None and found.has(forced.average, forced.views) else None


def _library(choice: _Choice, most: int, climbing: Climbing, study: Study, evidence: Evidence | None) -> Library:
    """The configurations that may join the choice: contenders of its confirmation, or else trials that are kept.

    Raises:
        StudyError: There are none.
    """
    import torch

    from core.data import folds
    from hpo.submission.peers import Library, confirmed_peers, kept_peers

    labels = climbing.dataset.labels
    if choice.confirmation is not None and evidence is not None:
        winner = choice.confirmation.winner if choice.ladder is None else choice.ladder.chosen
        peers = confirmed_peers(study, choice.confirmation, winner, evidence.images, labels)
        whose = "no other contender of the confirmation has predictions of its held-out images"
    else:
        splits = folds(climbing.dataset, choice.config.data)
        images = torch.cat([each.val for each in splits]).cpu() if evidence is None else evidence.images
        peers = kept_peers(study, choice.number, choice.config, images, labels)
        whose = "no other trial has predictions of its validation images on this machine"
    if not peers:
        raise StudyError(f"--ensemble {most}: {choice.name} is alone, {whose}; leave --ensemble out")
    for peer in peers:
        study.check_sources(peer.config)
    return Library(tuple(peers), most)


def _networks(options: RefitOptions, config: TrainConfig) -> str:
    """Describe an ensemble; nothing for one network."""
    if options.folds is not None:
        return f" as {options.folds} networks, each without another part of the images"
    if options.ensemble is not None:
        return f", perhaps with other configurations as up to {options.ensemble} networks"
    if options.members is None:
        return ""
    validation = ", validated on data.val_fraction instead of folds" if config.data.folds is not None else ""
    return f" as {options.members} networks from {options.members} seeds{validation}"


def _selected(study: Study, options: RefitOptions, reporter: Reporter) -> int:
    """The number of the trial that is selected by its costs."""
    from hpo.study.front import select, shown

    found = select(study, options.trial, options.within)
    costs = ", ".join(f"{name} {shown(name, cost)}" for name, cost in found.costs.items())
    reporter.say(f"not confirmed: {options.trial} is trial {found.trial}: {study.metric} {found.value:.4f}, {costs}")
    return found.trial


def _choose(study: Study, options: RefitOptions, reporter: Reporter, interrupts: Interrupts) -> _Choice:
    """Choose a trial by its number, the best by its validation score, or the confirmed winner.

    Raises:
        StudyError: The study is a confirmation, or has no such complete trial.
    """
    if options.trial != BEST:
        number = int(options.trial) if options.trial.isdecimal() else _selected(study, options, reporter)
        return _of_trial(study, number, f"{number:05d}")
    from hpo.api.confirm import check_is_search
    from hpo.confirmation.candidates import best_searched

    check_is_search(study)
    best = best_searched(study)
    if options.confirm:
        return _winner(study, options, reporter, interrupts)
    name = best.name if best.trial is None else f"trial {best.trial}"
    score = f"{study.metric} {best.search_value:.4f}"
    reporter.say(f"not confirmed: {name} is the best by its one validation score, {score}")
    if study.paths.confirmation.exists():
        reporter.say(f"  {study.paths.confirmation} is ignored (--no-confirm)")
    if best.trial is not None:
        return _of_trial(study, best.trial, BEST)
    return _Choice(name, BEST, None, best.train_config, best.epochs, recipe=best.recipe)


def _of_trial(study: Study, number: int, label: str) -> _Choice:
    trained = study.trained(number)
    kept = TrainingPaths(study.paths.trial(number))
    return _Choice(f"trial {number}", label, number, trained.config, trained.epochs, kept)


def _epochs(options: RefitOptions) -> int | None:
    """Return the epochs that were given; None for `auto` and by default."""
    if options.epochs in (None, AUTO):
        return None
    if options.epochs.isdecimal() and 1 <= int(options.epochs) <= MOST_EPOCHS:
        return int(options.epochs)
    raise StudyError(f"--epochs {options.epochs}: give a number from 1 to {MOST_EPOCHS:,}, or {AUTO}")


def _at_length(choice: _Choice, options: RefitOptions, climbing: Climbing, study: Study | None = None) -> _Choice:
    """Change the length of the training as asked or, for a confirmed winner, as its ladder decides."""
    if choice.length is not None:
        return choice
    epochs = _epochs(options)
    if epochs is not None:
        if epochs == choice.config.epochs:
            return choice
        return replace(choice, config=choice.config.override({"epochs": epochs}), epochs=None, kept=None)
    if choice.confirmation is None:
        if options.epochs is None:
            return choice
        ladder, config, folder = climbing.on_own_split(choice.name, choice.config, choice.kept)
    else:
        assert study is not None, "only a search is confirmed"
        ladder, config, folder = climbing.confirmed(study, choice.confirmation)
        if ladder.chosen != choice.confirmation.winner:
            choice = _of_contender(study, choice.confirmation, ladder.chosen)
    if ladder.epochs == ladder.searched:
        return replace(choice, ladder=ladder)
    return replace(choice, ladder=ladder, config=config, epochs=None, kept=folder)


def _winner(study: Study, options: RefitOptions, reporter: Reporter, interrupts: Interrupts) -> _Choice:
    """Choose the confirmed winner; train the confirmation first where it is missing or not current."""
    from hpo.api.confirm import confirmed

    say = reporter.say
    known = read_confirmation(study.paths.confirmation)
    current = known is not None and is_current(known, study.counts().finished)
    if not current:
        say(f"confirming the best trial of study {study.name} against the baseline first (skip with --no-confirm)")
    confirmation = confirmed(
        study, ConfirmOptions(data=options.data, device=options.device, weights=options.weights), reporter, interrupts
    )
    for line in confirmation.headline() if current else ("", *confirmation.lines(), ""):
        say(line)
    return _of_contender(study, confirmation, confirmation.winner)


def _of_contender(study: Study, confirmation: Confirmation, key: str) -> _Choice:
    one = confirmation.contender(key)
    if one.trial is None:
        found = _Choice(one.name, BEST, None, one.train_config, one.epochs)
    else:
        found = replace(_of_trial(study, one.trial, BEST), name=one.name)
    return replace(found, recipe=one.recipe, confirmation=confirmation)
