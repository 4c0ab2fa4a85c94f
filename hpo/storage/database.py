"""Studies in a database: Optuna's RDBStorage, with retries during outages and atomic claims."""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Container, Sequence
from datetime import datetime
from functools import wraps
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, event

from hpo.storage.lease import LEASE, own_lease
from hpo.storage.outage import Outage, is_no_outage

HEARTBEAT_S = 30
"""Seconds between two heartbeats of a running trial; each is one write."""
GRACE_S = 360
"""Seconds without a heartbeat until a trial counts as dead; longer than any outage that is waited for."""

# Timeouts of a connection to a server, and of a locked SQLite file.
_CONNECT_TIMEOUT_S = 10
_SQLITE_TIMEOUT_S = 60
# Seconds until a lost machine is noticed; the default of most systems is two hours.
_SILENCE_S = 60
# Trials that are read by id: SQLite before 3.32 takes 999 values in a statement.
_MOST_BY_NUMBER = 900
_LAST_TRIAL = 2**31 - 1  # largest value of the id column
# For a schema that another process is creating, which takes about a second.
_SCHEMA_ATTEMPTS = 20
_SCHEMA_PAUSE_S = 0.25


def open_database(url: str, *, patient: bool = False) -> BaseStorage:
    """Open a database and create its tables; if `patient`, outlast outages."""
    database = Outage(url).outlast(lambda _: _with_tables(url)) if patient else _with_tables(url)
    return get_storage(database)


def _with_tables(url: str) -> _Database:
    for _ in range(_SCHEMA_ATTEMPTS - 1):
        try:
            return _Database(url)
        except Exception as error:
            # Of two processes that create the tables at once, one finds them incomplete.
            if not re.search(r"already exists|duplicate|UNIQUE", str(error)):
                raise
            time.sleep(_SCHEMA_PAUSE_S)
    return _Database(url)


def _engine_options(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": _SQLITE_TIMEOUT_S}}
    # No check for dropped connections, which takes a sixth longer: failed operations are repeated on a new one.
    options: dict[str, Any] = {"pool_pre_ping": False}
    # One for the worker, one for its heartbeat: PostgreSQL allows 100 by default.
    options |= {"pool_size": 1, "max_overflow": 9}
    if url.startswith("postgresql"):
        known = {"keepalives_idle": _SILENCE_S // 2, "keepalives_interval": _SILENCE_S // 6, "keepalives_count": 3}
        known |= {"connect_timeout": _CONNECT_TIMEOUT_S, "tcp_user_timeout": _SILENCE_S * 1000}
    elif url.startswith("mysql"):
        known = {"connect_timeout": _CONNECT_TIMEOUT_S, "read_timeout": _SILENCE_S, "write_timeout": _SILENCE_S}
    else:
        return options
    asked = {name for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)}
    return options | {"connect_args": {name: value for name, value in known.items() if name not in asked}}


class _Database(RDBStorage):
    """Optuna's database storage, which repeats operations while the server does not answer.

    Repetition is harmless: values are overwritten with the same, claims and pauses are recognized by their lease, and
    of two trials that are created the second is never run.
    """

    def __init__(self, url: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(
                url, engine_kwargs=_engine_options(url), heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S
            )
        self.outage = Outage(url)
        self._waiting: dict[int, tuple[datetime | None, FrozenTrial]] = {}
        """Id -> last start and trial: one that has run since, and waits again, differs from before."""
        _set_up(self.engine)
        self.engine.dispose()  # connections from before the set-up
        logging.getLogger("optuna.storages._rdb.storage").addFilter(is_no_outage)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Set the state; with RUNNING, also store this process's lease and a first heartbeat."""
        if state == TrialState.RUNNING:
            return self.outage.outlast(lambda again: self._claim(trial_id, again=again))
        if state == TrialState.WAITING:
            return self.outage.outlast(lambda _: self._pause(trial_id))
        return self.outage.outlast(lambda again: self._end(trial_id, state, values, again=again))

    def _claim(self, trial_id: int, *, again: bool) -> bool:
        with _create_scoped_session(self.scoped_session) as session:
            trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            self.check_trial_is_updatable(trial_id, trial.state)
            if trial.state != TrialState.WAITING:
                # Another process has it, or this one, if the answer to its earlier attempt was lost.
                leases = [json.loads(item.value_json) for item in trial.user_attributes if item.key == LEASE]
                return again and leases == [own_lease()]
            self._set_trial_attr_without_commit(session, models.TrialUserAttributeModel, trial_id, LEASE, own_lease())
            session.query(models.TrialHeartbeatModel).filter_by(trial_id=trial_id).delete()  # of a run before a pause
            session.add(models.TrialHeartbeatModel(trial_id=trial_id))
            trial.state = TrialState.RUNNING
            trial.datetime_start = datetime.now()
        return True

    def _pause(self, trial_id: int) -> bool:
        with _create_scoped_session(self.scoped_session) as session:
            trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            self.check_trial_is_updatable(trial_id, trial.state)
            leases = [json.loads(item.value_json) for item in trial.user_attributes if item.key == LEASE]
            if leases == [None]:  # else this is a repetition, and another process has claimed it since
                trial.state = TrialState.WAITING
        return True

    def _end(self, trial_id: int, state: TrialState, values: Sequence[float] | None, *, again: bool) -> bool:
        try:
            return super().set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            if not again:
                raise
            trial = super().get_trial(trial_id)
            if trial.state == state and (values is None or trial.values == list(values)):
                return True
            raise

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """Read trials as Optuna does, but waiting ones, which are most, only once until they run."""
        if states is not None:
            return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        with _create_scoped_session(self.scoped_session) as session:
            columns = models.TrialModel.__table__.c
            known = session.query(columns.trial_id, columns.state, columns.datetime_start)
            rows = known.filter(columns.study_id == study_id).all()
        found = {
            number: (state, start)
            for number, state, start in rows
            if number > trial_id_greater_than or number in included_trial_ids
        }
        waiting = [
            trial
            for number, (start, trial) in self._waiting.items()
            if found.get(number) == (TrialState.WAITING, start)
        ]
        others = found.keys() - {trial._trial_id for trial in waiting}
        if len(others) > _MOST_BY_NUMBER or not found:
            return super()._get_trials(study_id, None, included_trial_ids, trial_id_greater_than)
        read = super()._get_trials(study_id, None, others, _LAST_TRIAL) if others else []
        for trial in read:
            if found[trial._trial_id][0] == trial.state == TrialState.WAITING:
                self._waiting[trial._trial_id] = found[trial._trial_id][1], trial
        return sorted(waiting + read, key=lambda trial: trial._trial_id)


def _outlasting(operation: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(operation)
    def outlasts(self: _Database, *args: Any, **keywords: Any) -> Any:
        return self.outage.outlast(lambda _: operation(self, *args, **keywords))

    return outlasts


for _name in (
    *("create_new_study", "delete_study", "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name"),
    *("get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs"),
    *("get_all_studies", "_create_new_trial", "_set_trial_param", "get_trial_id_from_study_id_trial_number"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr", "get_trial", "_get_trials"),
    *("_get_best_trial_id", "record_heartbeat", "_get_stale_trial_ids"),
):  # the methods that Optuna's cache calls
    setattr(_Database, _name, _outlasting(getattr(_Database, _name)))


_ON_CONNECT = {
    # The write-ahead log saves most of the syncs.
    "sqlite": ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL"),
    # Heartbeats in UTC; with summer time, every trial would look dead for an hour a year.
    "postgresql": ("SET TIME ZONE 'UTC'",),
    "mysql": ("SET time_zone = '+00:00'",),
}


def _set_up(engine: Engine) -> None:
    """Prepare every connection, and make every transaction of SQLite exclusive from its start.

    It has no SELECT … FOR UPDATE: in deferred transactions two processes could claim the same trial.
    """
    is_sqlite = engine.name == "sqlite"

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        if is_sqlite:
            connection.isolation_level = None  # no implicit BEGIN
        cursor = connection.cursor()
        for statement in _ON_CONNECT.get(engine.name, ()):
            cursor.execute(statement)
        cursor.close()
        connection.commit()  # else the pool's first rollback reverts it

    if is_sqlite:
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
