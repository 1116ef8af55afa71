"""What the client keeps of a cluster, and its operators' part: the cluster's state, keys, ceremonies, revocations.

:class:`keyquorum.aio.AsyncClient` adds what owners do.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from keyquorum import keys as keyring
from keyquorum.ceremonies import Ceremonies, CeremonyRecord, Ended
from keyquorum.cluster import ClusterStatus, cluster_status
from keyquorum.drills import Drills, DrillState, Finished, MomentCallback
from keyquorum.keyfiles import PassphraseSource, unlock
from keyquorum.keys import KeyRecord
from keyquorum.profile import Profile
from keyquorum.progress import ProgressCallback, silent
from keyquorum.revoking import Held, fetch, hand_over
from keyquorum.session import Connection
from keyquorum_core.drill_report import FULL
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.sealing import Suite

__all__ = ["ClusterClient"]


class ClusterClient:
    """One cluster over connections and key files that are opened when first needed, and what operators do with it.

    All methods raise :class:`keyquorum.KeyquorumError` and nothing else for what goes wrong outside this process.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        passphrase: PassphraseSource = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.profile = profile
        self._passphrase = passphrase
        self._clock = clock
        self._connections: dict[str, Connection] = {}
        self._unlocked: dict[str, LoadedKeys] = {}
        self._certificates: dict[str, KeyRecord] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up and forget the keys. Idempotent."""
        self._unlocked.clear()
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()

    def _connection(self, role: str | None = None) -> Connection:
        role = role or ("owner" if self.profile.owner is not None else "operator")
        if role not in self._connections:
            self._connections[role] = Connection(self.profile, self.profile.principal(role).tls)
        return self._connections[role]

    async def _keys(self, role: str) -> LoadedKeys:
        if role not in self._unlocked:
            principal = self.profile.principal(role)
            self._unlocked[role] = await asyncio.to_thread(
                unlock, principal.key_file, role, principal.name, self._passphrase
            )
        return self._unlocked[role]

    async def _newest(self, connection: Connection, key_id: str) -> KeyRecord:
        record = await keyring.get_key(connection, self.profile, key_id)
        self._certificates[record.certificate_sha256] = record
        return record

    async def _certified(self, connection: Connection, key_id: str, epoch: int) -> KeyRecord:
        """An epoch by its verified certificate, which never changes. Raises :class:`StateError` (``EPOCH``)."""
        known = self._known(key_id, epoch)
        if known is None:
            known = await keyring.get_key(connection, self.profile, key_id, epoch)
            self._certificates[known.certificate_sha256] = known
        return known

    def _known(self, key_id: str, epoch: int) -> KeyRecord | None:
        records = self._certificates.values()
        return next((each for each in records if (each.key_id, each.epoch) == (key_id, epoch)), None)

    # Cluster and keys

    async def status(self, *, max_skew: float = 5.0, patient: bool = True) -> ClusterStatus:
        """Who serves, and how much more each key survives by its verified certificate; see :mod:`keyquorum.cluster` for
        what is the coordinator's word. ``max_skew``: seconds that a clock may be off before it is a finding.
        ``patient``: wait for a coordinator that is being restarted.

        Raises :class:`UnavailableError` where the coordinator can't be reached. A key without a quorum is a finding.
        """
        return await cluster_status(
            self._connection(),
            self.profile,
            now=int(self._clock()),
            certificates=self._certificates,
            max_skew=max_skew,
            patient=patient,
        )

    async def keys(self) -> tuple[KeyRecord, ...]:
        """The cluster's keys, each with its certificate verified."""
        return await keyring.list_keys(self._connection(), self.profile)

    async def key(self, key_id: str, epoch: int | None = None) -> KeyRecord:
        """One key, its newest epoch or this one: its certificate carries the signatures of all who made it.

        Raises :class:`RefusedError` where it doesn't, :class:`StateError` (``UNKNOWN_KEY``, ``EPOCH``) where there is
        none.
        """
        return await keyring.get_key(self._connection(), self.profile, key_id, epoch)

    async def key_create(
        self,
        key_id: str,
        *,
        suite: str = Suite.MLKEM768_X25519,
        policy: KeyPolicy | None = None,
        progress: ProgressCallback | None = None,
    ) -> KeyRecord:
        """Have the custodians generate a key together, under ``policy`` or its defaults. Needs the profile's section
        ``[operator]``."""
        return await (await self._ceremonies()).generate(
            key_id,
            suite=suite,
            policy=policy or KeyPolicy(),
            now=int(self._clock()),
            progress=progress or silent,
        )

    async def key_epochs(self, key_id: str) -> tuple[KeyRecord, ...]:
        """All epochs of a key, newest first, each with its certificate verified."""
        return await keyring.list_epochs(self._connection(), self.profile, key_id)

    async def key_rotate(
        self,
        key_id: str,
        *,
        policy: KeyPolicy | None = None,
        renew: bool = False,
        progress: ProgressCallback | None = None,
    ) -> KeyRecord:
        """Make the key's next epoch, out of the present one, or with ``renew`` anew, for another committee or rule.

        Jobs that run go on with the epoch they began with. Needs the profile's section ``[operator]``.
        """
        ceremonies = await self._ceremonies()
        now = int(self._clock())
        return await ceremonies.rotate(key_id, policy=policy, renew=renew, now=now, progress=progress or silent)

    async def key_repair(
        self,
        key_id: str,
        custodian: str,
        *,
        epoch: int = 0,
        replace: bool = False,
        operator_keys: Sequence[str | os.PathLike[str]] = (),
        progress: ProgressCallback | None = None,
    ) -> Ended:
        """Have a custodian get its seeds of an epoch (the newest: 0) from its co-holders; with ``replace``, one that
        took another's place. ``operator_keys``: key files of further operators who sign."""
        ceremonies = await self._ceremonies(operator_keys)
        return await ceremonies.rebuild(
            key_id, custodian, epoch=epoch, replace=replace, now=int(self._clock()), progress=progress or silent
        )

    async def key_destroy(
        self,
        key_id: str,
        epoch: int,
        *,
        operator_keys: Sequence[str | os.PathLike[str]] = (),
        progress: ProgressCallback | None = None,
    ) -> Ended:
        """Have an epoch erased everywhere, for ever, once each custodian's operator approved."""
        ceremonies = await self._ceremonies(operator_keys)
        return await ceremonies.destroy(key_id, epoch, now=int(self._clock()), progress=progress or silent)

    async def ceremonies(self, key_id: str = "") -> tuple[CeremonyRecord, ...]:
        """All ceremonies, or those of one key, the latest first: where each is, and what stopped it."""
        return await (await self._ceremonies()).records(key_id)

    async def ceremony_cancel(self, ceremony_id: str, why: str = "") -> CeremonyRecord:
        """Give a ceremony up; what was there before stays as it was."""
        return await (await self._ceremonies()).cancel(ceremony_id, why)

    async def drills(self) -> DrillState:
        """The kinds of drill, when each passed last, what is scheduled, and the latest runs. For operators."""
        return await Drills(self._connection("operator"), self.profile).state()

    async def drill_run(
        self,
        kind: str,
        key_id: str = "canary",
        *,
        operator_keys: Sequence[str | os.PathLike[str]] = (),
        moment: MomentCallback | None = None,
    ) -> Finished:
        """Rehearse a failure on a canary key; returns the signed report, whether or not the drill passed.

        ``moment`` hears what happens meanwhile. ``operator_keys``: key files of further operators, for what a drill of
        *revocation* needs signed. Needs the profile's section ``[operator]`` and its member ``drill``.
        """
        operators: list[LoadedKeys] = []
        if kind in ("revocation", FULL):
            operators = await self._operators(operator_keys)
        drills = Drills(self._connection("operator"), self.profile, operators)
        return await drills.run(kind, key_id, now=int(self._clock()), moment=moment or (lambda moment: None))

    async def drill_report(self, drill_id: str) -> Finished:
        """The signed report of a drill that ended."""
        return await Drills(self._connection("operator"), self.profile).report(drill_id)

    async def drill_cancel(self, drill_id: str) -> bool:
        """Stop a drill; what it injected is undone. False: it does not run."""
        return await Drills(self._connection("operator"), self.profile).cancel(drill_id)

    async def revocations(self) -> Held:
        """What the operators revoked, by the document that the coordinator has, verified. For operators."""
        return await fetch(self._connection("operator"), self.profile)

    async def revoke(self, document: bytes) -> Held:
        """Hand a signed document of revocations to the coordinator, which acts on it and hands it to every custodian.

        Raises what it is refused for; ``BULLETIN`` where the coordinator answers with another one.
        """
        return await hand_over(self._connection("operator"), self.profile, document)

    async def _ceremonies(self, operator_keys: Sequence[str | os.PathLike[str]] = ()) -> Ceremonies:
        return Ceremonies(self._connection("operator"), self.profile, await self._operators(operator_keys))

    async def _operators(self, operator_keys: Sequence[str | os.PathLike[str]]) -> list[LoadedKeys]:
        """The profile's own operator, and those whose key files are given."""
        own = await self._keys("operator")
        further = [
            await asyncio.to_thread(unlock, Path(path), "operator", None, self._passphrase) for path in operator_keys
        ]
        return [own, *further]
