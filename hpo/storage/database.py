"""A study in a database: Optuna's RDBStorage, which outlasts its server's restart and claims a trial in one piece."""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Container, Sequence
from datetime import datetime
from functools import partial, wraps
from typing import Any

from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Engine, event

from hpo.storage.lease import LEASE, own_lease
from hpo.storage.outage import Outage, is_no_outage
from hpo.storage.urls import options_of

HEARTBEAT_S = 30
"""Seconds between two heartbeats of a running trial: small beside the grace, and a write a trial, as a report is."""
GRACE_S = 360
"""Seconds without a heartbeat after which a trial is dead. More than the patience, a heartbeat and a pause together:
after an outage that workers of another host survive, none of theirs is taken for dead before it has spoken."""

# Seconds until a server that does not answer a connection is given up, and until a locked SQLite file is.
_CONNECT_TIMEOUT_S = 10
_SQLITE_TIMEOUT_S = 60
# Seconds after which a machine that vanished without a word is noticed; a system's own idea is two hours.
_SILENCE_S = 60
# Trials that are asked for one by one, at most: SQLite before 3.32 takes 999 values in a statement.
_MOST_BY_NUMBER = 900
_LAST_TRIAL = 2**31 - 1  # the largest that the column of a trial's identity holds
# Attempts at a schema that another process is making, and the seconds between them: it takes about a second.
_SCHEMA_ATTEMPTS = 20
_SCHEMA_PAUSE_S = 0.25


def open_database(url: str, *, patient: bool = False) -> BaseStorage:
    """Opens a database, and makes its tables where there are none.

    Args:
        patient: waits for a server that does not answer, as every operation afterwards does.

    Raises:
        StudyError: the server did not answer in time.
        Exception: whatever else SQLAlchemy, the driver or Optuna has to say.
    """
    database = Outage(url).outlast(lambda _: _with_tables(url)) if patient else _with_tables(url)
    return get_storage(database)


def _with_tables(url: str) -> _Database:
    for _ in range(_SCHEMA_ATTEMPTS - 1):
        try:
            return _Database(url)
        except Exception as error:
            # Two processes that begin at once both make the tables, and one of them finds them half made.
            if not re.search(r"already exists|duplicate|UNIQUE", str(error)):
                raise
            time.sleep(_SCHEMA_PAUSE_S)
    return _Database(url)


def _engine_options(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": _SQLITE_TIMEOUT_S}}
    # A connection that the server dropped is not looked for before each transaction, which would take a sixth longer:
    # what fails on it is done again on a new one.
    options: dict[str, Any] = {"pool_pre_ping": False}
    # A worker's own thread keeps its connection; its heartbeat borrows one every half minute. So 32 workers stay far
    # below the 100 connections that PostgreSQL allows unless told.
    options |= {"pool_size": 1, "max_overflow": 9}
    if url.startswith("postgresql"):
        known = {"keepalives_idle": _SILENCE_S // 2, "keepalives_interval": _SILENCE_S // 6, "keepalives_count": 3}
        known |= {"connect_timeout": _CONNECT_TIMEOUT_S, "tcp_user_timeout": _SILENCE_S * 1000}
    elif url.startswith("mysql"):
        known = {"connect_timeout": _CONNECT_TIMEOUT_S, "read_timeout": _SILENCE_S, "write_timeout": _SILENCE_S}
    else:
        return options
    asked = options_of(url)
    return options | {"connect_args": {name: value for name, value in known.items() if name not in asked}}


class _Database(RDBStorage):
    """Optuna's storage in a database, each operation tried again while the server does not answer.

    Doing it twice is doing it once: attributes, values of epochs, parameters and heartbeats are written over with
    themselves. The end of a trial that is in place already is taken for ours. A claim carries our lease in the same
    transaction, by which we know it again. A trial that is created twice is two waiting trials of one slot, of which
    the second is never run.
    """

    def __init__(self, url: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna's label on its heartbeat
            super().__init__(
                url, engine_kwargs=_engine_options(url), heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S
            )
        self.outage = Outage(url)
        self._waiting: dict[int, FrozenTrial] = {}
        if self.engine.name in _SET_UPS:
            _SET_UPS[self.engine.name](self.engine)
            self.engine.dispose()  # the connections that were made before
        logging.getLogger("optuna.storages._rdb.storage").addFilter(is_no_outage)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's. A trial that is made RUNNING gets our lease and a first heartbeat with it."""
        if state == TrialState.RUNNING:
            return self.outage.outlast(lambda again: self._claim(trial_id, again=again))
        return self.outage.outlast(lambda again: self._end(trial_id, state, values, again=again))

    def _claim(self, trial_id: int, *, again: bool) -> bool:
        with _create_scoped_session(self.scoped_session) as session:
            trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            self.check_trial_is_updatable(trial_id, trial.state)
            if trial.state != TrialState.WAITING:
                # Another process has it; or we, if the attempt before was done and its answer lost.
                leases = [json.loads(item.value_json) for item in trial.user_attributes if item.key == LEASE]
                return again and leases == [own_lease()]
            self._set_trial_attr_without_commit(session, models.TrialUserAttributeModel, trial_id, LEASE, own_lease())
            session.add(models.TrialHeartbeatModel(trial_id=trial_id))
            trial.state = TrialState.RUNNING
            trial.datetime_start = datetime.now()
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
        """As Optuna's, but trials that were read waiting and still wait are not read again.

        A study's slots all wait from its beginning, and a worker reads the trials several times for each that it runs.
        What is changed about a waiting trial is seen once it runs.
        """
        if states is not None:
            return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        with _create_scoped_session(self.scoped_session) as session:
            known = session.query(models.TrialModel.trial_id, models.TrialModel.state)
            stands = dict(known.filter(models.TrialModel.study_id == study_id).all())
        found = {
            number: state
            for number, state in stands.items()
            if number > trial_id_greater_than or number in included_trial_ids
        }
        waiting = [trial for number, trial in self._waiting.items() if found.get(number) == TrialState.WAITING]
        others = found.keys() - {trial._trial_id for trial in waiting}
        if len(others) > _MOST_BY_NUMBER or not found:
            return super()._get_trials(study_id, None, included_trial_ids, trial_id_greater_than)
        read = super()._get_trials(study_id, None, others, _LAST_TRIAL) if others else []
        self._waiting |= {trial._trial_id: trial for trial in read if trial.state == TrialState.WAITING}
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
):  # what Optuna's cache, which lies on top, asks of a database
    setattr(_Database, _name, _outlasting(getattr(_Database, _name)))


def _serialise(engine: Engine) -> None:
    """Makes every transaction of a SQLite storage exclusive from its beginning.

    SQLite knows no SELECT … FOR UPDATE, so with its deferred transactions two processes both read that a trial waits,
    and both claim it; or both want to write after reading, and one gets "database is locked" at once. The write-ahead
    log saves most of the syncs.
    """

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours to say
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _in_utc(engine: Engine, statement: str) -> None:
    """Keeps heartbeats by a clock without summer time, in which every trial would look dead for an hour a year."""

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()  # else the pool's first rollback takes it back


_SET_UPS: dict[str, Callable[[Engine], None]] = {
    "sqlite": _serialise,
    "postgresql": partial(_in_utc, statement="SET TIME ZONE 'UTC'"),
    "mysql": partial(_in_utc, statement="SET time_zone = '+00:00'"),
}
