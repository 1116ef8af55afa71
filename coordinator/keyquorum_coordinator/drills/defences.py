"""Drills of what custodians must refuse: a revoked owner, forged evidence, a log with two histories."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import grpc.aio

from keyquorum_coordinator.drills.probing import LIFETIME, SKEW
from keyquorum_coordinator.drills.rehearsal import Rehearsal
from keyquorum_core import manifest as manifests
from keyquorum_core.attestation.binding import report_data
from keyquorum_core.attestation.development import DevelopmentChip, DevelopmentVendor
from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.attestation.naming import claims_development
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.ledger.log_keys import LogSigner, SignedCheckpoint, open_checkpoint
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.presentation import sign_presentation
from keyquorum_core.release import WINDOW_TYPE, Leaf, Window, open_window
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, peek_payload
from keyquorum_protos.v1 import custodian_pb2
from keyquorum_protos.v1 import drills_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error, from_status

__all__ = ["forged_evidence", "revocation", "split_view"]

_SHOWN_SECONDS = 10.0
_HEARD_SECONDS = 30.0
_NO_SIGNING_KEY = 7 << 2
_MEASUREMENT = hashlib.sha384(b"keyquorum drill: evidence that no hardware made").digest()


@dataclass(frozen=True, slots=True)
class Forgery:
    """``evidence`` as it is shown, and ``logged`` as the leaf has it; what a custodian has to say to it, at which of
    its checks."""

    what: str
    evidence: bytes
    logged: bytes
    reason: Reason
    check: str = "recipient"

    def refused(self, error: KeyquorumError) -> bool:
        """For what is wrong with it, and for nothing else. ``EVIDENCE_TYPE`` is as good where the document has what the
        job asks for: that custodian accepts no SEV-SNP at all."""
        no_such = self.check == "recipient" and self.reason in (Reason.ROOT_NOT_PINNED, Reason.SIGNATURE)
        reasons = {self.reason, Reason.EVIDENCE_TYPE} if no_such else {self.reason}
        return error.reason in reasons and error.details.get("check") == self.check


# -- revocation ------------------------------------------------------------------------------------------------------


async def revocation(drill: Rehearsal) -> None:
    """*detect*: from the coordinator taking the operators' document until the last custodian refuses the revoked owner.
    *recover*: from taking the one that lifts it until every custodian serves again."""
    withdrawals = drill.tools.withdrawals
    drill.undoing(lambda: _hand_over(drill, drill.order.lift))
    drill.mark()
    await withdrawals.accept(drill.order.revoke)
    await withdrawals.relay_once()
    drill.say("inject", "the operators revoked the drill's owner")
    found = await drill.until(
        lambda each: _reasons(each.failed, drill.ids) == {str(Reason.REVOKED)}, seconds=_HEARD_SECONDS
    )
    everybody = _reasons(found.failed, drill.ids) == {str(Reason.REVOKED)} and not found.served
    if everybody:
        drill.detected("every custodian refuses the revoked owner")
    drill.check(
        "every custodian refuses the revoked owner, and says why",
        everybody and found.key is None,
        expected=f"{Reason.REVOKED} from {', '.join(drill.ids)}",
        actual=found.words(),
    )
    drill.mark()
    await drill.undo()
    back = await drill.until(lambda each: set(each.served) == set(drill.ids), seconds=_HEARD_SECONDS)
    if set(back.served) == set(drill.ids):
        drill.recovered("every custodian serves again")
    drill.check(
        "once it is lifted every custodian serves again",
        set(back.served) == set(drill.ids) and drill.right(back),
        expected=f"shares from {', '.join(drill.ids)}, and the same key",
        actual=back.words(),
    )


async def _hand_over(drill: Rehearsal, document: bytes) -> str:
    await drill.tools.withdrawals.accept(document)
    await drill.tools.withdrawals.relay_once()
    return "the operators' document that lifts it was handed to every custodian"


def _reasons(failed: Mapping[str, KeyquorumError], names: tuple[str, ...]) -> set[str]:
    return {str(failed[name].reason) if name in failed else "" for name in names}


# -- forged evidence -------------------------------------------------------------------------------------------------


async def forged_evidence(drill: Rehearsal) -> None:
    """*detect*: until the last custodian has refused the last forgery. *recover*: nothing broke; until the same job's
    owner, who may, is served."""
    now = int(drill.tools.clock())
    vendor = await asyncio.to_thread(DevelopmentVendor.create, now=now - 60)
    chip = await asyncio.to_thread(vendor.chip, now=now - 60)
    forger = _Forger(drill, chip)
    drill.mark()
    refusals: list[tuple[Forgery, dict[str, KeyquorumError]]] = []
    leaked: list[str] = []
    for each in await forger.forgeries():
        drill.say("inject", f"asking with {each.what}")
        refused, given = await forger.ask(each.evidence, each.logged)
        refusals.append((each, refused))
        leaked += given
    if not leaked:
        drill.detected("every custodian refused each forgery")
    for forgery, refused in refusals:
        drill.check(
            f"every custodian refuses {forgery.what}",
            set(refused) == set(drill.ids) and all(map(forgery.refused, refused.values())),
            expected=f"{', '.join(drill.ids)}: {forgery.reason}, at its check of {forgery.check}",
            actual=", ".join(f"{name} {_said(error)}" for name, error in sorted(refused.items())) or "no refusal",
        )
    drill.check(
        "nothing was released to the forger", not leaked, expected="no share", actual=", ".join(leaked) or "no share"
    )
    refused, given = await forger.ask(b"", b"")
    if set(given) == set(drill.ids):
        drill.recovered("the job's owner is served")
    drill.check(
        "it was the evidence that they refused: the same job's owner is served",
        set(given) == set(drill.ids),
        expected=f"shares from {', '.join(drill.ids)}",
        actual=", ".join(sorted(given)) or "; ".join(f"{each} {error.reason}" for each, error in refused.items()),
    )


def _said(error: KeyquorumError) -> str:
    return f"{error.reason} at {error.details.get('check', '?')}"


class _Forger:
    """A worker that nobody made: its evidence has the right form, from a vendor of its own."""

    def __init__(self, drill: Rehearsal, chip: DevelopmentChip) -> None:
        self._drill = drill
        self._chip = chip
        self._signing = Identity.generate()
        self._recipient = RecipientKey.generate()
        self._manifest = self._sign_manifest()

    def _sign_manifest(self) -> manifests.Manifest:
        drill, keys = self._drill, self._drill.tools.keys
        now = int(drill.tools.clock())
        return manifests.Manifest(
            subjects=(manifests.Subject("drill", hashlib.sha256(b"keyquorum drill").hexdigest()),),
            key_id=drill.key_id,
            epoch=drill.epoch,
            classification=drill.tools.classification,
            export_control="",
            regions=("drill",),
            evidence_types=("sev-snp",),
            resources=manifests.Resources(cpus=1, memory_mib=16, gpus=0, wall_seconds=1, output_mib=1),
            owner=keys.name,
            owner_identity=keys.identity.public,
            owner_hpke=keys.recipient.public,
            entrypoint=("drill",),
            not_before=now - SKEW,
            not_after=now + LIFETIME,
            issued_at=now,
            nonce=secrets.token_hex(16),
        )

    async def forgeries(self) -> list[Forgery]:
        """What can be made without hardware: nothing of it gets past the vendor's root."""
        windows = await self._windows()
        nonces = tuple(WindowNonce(name, each.window, each.nonce_bytes) for name, each in sorted(windows.items()))
        old = tuple(WindowNonce(each.custodian, max(0, each.window - 1000), bytes(32)) for each in nonces)
        made_up, unsigned, stale = (
            self._document(nonces),
            self._document(nonces, flags=_NO_SIGNING_KEY),
            self._document(old),
        )
        other = EvidenceItem("tpm2", b"-", ())
        untyped = EvidenceDocument(nonces, made_up.hpke_key, made_up.signing_key, (other,)).to_bytes()
        wanted = (
            ("evidence of a vendor that the forger made up", made_up.to_bytes(), Reason.ROOT_NOT_PINNED),
            ("evidence that no key of a chip signed", unsigned.to_bytes(), Reason.SIGNATURE),
            ("evidence for a challenge of long ago", stale.to_bytes(), Reason.STALE),
            ("evidence of another type than the job asks for", untyped, Reason.EVIDENCE_TYPE),
        )
        changed = self._document(nonces).to_bytes()
        return [
            *(Forgery(what, document, document, reason) for what, document, reason in wanted),
            Forgery("other evidence than the ledger shows", changed, made_up.to_bytes(), Reason.LEAF, "leaf"),
        ]

    def _document(self, nonces: tuple[WindowNonce, ...], *, flags: int | None = None) -> EvidenceDocument:
        """As a worker's: bound to its keys and to the challenge of these nonces."""
        draft = EvidenceDocument(
            nonces,
            self._recipient.public,
            self._signing.public.to_bytes(),
            (EvidenceItem("sev-snp", b"-", ()),),
        )
        bound = report_data(draft.hpke_key, draft.signing_key, draft.challenge())
        report = self._chip.sign_report(bound, _MEASUREMENT, flags=flags)
        item = EvidenceItem("sev-snp", report, self._chip.endorsements)
        return EvidenceDocument(draft.nonces, draft.hpke_key, draft.signing_key, (item,))

    async def _windows(self) -> dict[str, Window]:
        roster = self._drill.tools.fanout.roster
        found = {}
        for statement in await self._drill.tools.fanout.windows():
            claimed = Window.parse(peek_payload(statement, WINDOW_TYPE, "window"))
            found[claimed.custodian] = open_window(
                statement,
                roster.custodian(claimed.custodian).identity,
                custodian=claimed.custodian,
                cluster=roster.cluster,
                now=int(self._drill.tools.clock()),
                skew=60,
            )
        return found

    async def ask(self, evidence: bytes, logged: bytes) -> tuple[dict[str, KeyquorumError], list[str]]:
        """Who refused and why, and who gave a share; without evidence the owner asks. The ledger has ``logged``."""
        tools, payload = self._drill.tools, manifests.payload(self._manifest)
        job = manifests.job_id(payload)
        digest = hashlib.sha256(logged).hexdigest() if logged else Leaf.NO_EVIDENCE
        key = self._recipient.public if evidence else self._manifest.owner_hpke
        leaf = Leaf(
            job_id=job,
            manifest_sha256=hashlib.sha256(payload).hexdigest(),
            recipient_sha256=hashlib.sha256(key).hexdigest(),
            evidence_sha256=digest,
            key_id=self._drill.key_id,
            epoch=self._drill.epoch,
            time=int(tools.clock()),
            recipient="worker" if evidence else "owner",
            development=bool(evidence) and claims_development(EvidenceDocument.parse(evidence)),
        ).to_bytes()
        request = custodian_pb2.ReleaseRequest(
            manifest=manifests.sign_manifest(self._manifest, tools.keys.identity),
            leaf=leaf,
            evidence=evidence,
            presentation=sign_presentation(self._signing, job, digest) if evidence else b"",
        )
        entry = await tools.sequencer.append(leaf, b"release:" + hashlib.sha256(leaf).digest())
        refused: dict[str, KeyquorumError] = {}
        given: list[str] = []
        async with await tools.witnesses.release(entry, request) as release:
            async for arrival in release:
                if arrival.answer.HasField("share"):
                    given.append(arrival.custodian)
                else:
                    refused[arrival.custodian] = from_status(arrival.answer.refusal)
        return refused, sorted(given)


# -- split view ------------------------------------------------------------------------------------------------------


async def split_view(drill: Rehearsal) -> None:
    """*detect*: from the first contradicting checkpoint until the last custodian holds both and stops. *recover*: from
    the end of the fault until every custodian serves again."""
    log = LogSigner.generate(f"drill-{drill.order.drill_id}/ledger")
    now = int(drill.tools.clock())
    histories = [
        log.sign(1, leaf_hash(f"history {number} of drill {drill.order.drill_id}".encode()), now) for number in (1, 2)
    ]
    for name in drill.ids:
        await drill.inject(name, "split-view", log_key=log.keys.encode())
    drill.mark()
    proven = await asyncio.gather(
        *(_show_both(drill, name, log, histories[:: 1 if at % 2 else -1]) for at, name in enumerate(drill.ids))
    )
    if all(proven):
        drill.detected("every custodian holds both signed histories")
    drill.check(
        "every custodian holds the proof: two checkpoints that the log signed and that cannot both be",
        all(proven),
        expected=f"both from {', '.join(drill.ids)}",
        actual=", ".join(name for name, each in zip(drill.ids, proven, strict=True) if each) or "none",
    )
    found = await drill.probe()
    drill.check(
        "every custodian stops serving the canary for it",
        _reasons(found.failed, drill.ids) == {str(Reason.LEDGER_FORK)} and not found.served,
        expected=f"{Reason.LEDGER_FORK} from {', '.join(drill.ids)}",
        actual=found.words(),
    )
    unwell = await _not_quiet(drill)
    drill.check(
        "the cluster's own ledger raised no alarm, and its releases go on",
        not unwell,
        expected="every custodian takes the ledger's newest checkpoint",
        actual=unwell or "so it is",
    )
    await drill.lift()


async def _show_both(drill: Rehearsal, name: str, log: LogSigner, histories: list[SignedCheckpoint]) -> bool:
    """Show one, then the other: whether the custodian holds both, as the log signed them."""
    canary = drill.tools.fanout.links[name].canary
    answer = pb.ShowCheckpointResponse()
    for each in histories:
        update = custodian_pb2.CheckpointUpdate(checkpoint=each.encode(), old_size=0)
        request = pb.ShowCheckpointRequest(drill_id=drill.order.drill_id, key_id=drill.key_id, update=update)
        try:
            answer = await canary.Show(request, timeout=_SHOWN_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, name) from None
        drill.say("inject", "shown a history", name)
    try:
        both = [open_checkpoint(note, log.keys).checkpoint for note in (answer.known, answer.shown)]
    except KeyquorumError:
        return False
    return both[0].size == both[1].size and both[0].root != both[1].root


async def _not_quiet(drill: Rehearsal) -> str:
    """Who says that it has an alarm about the cluster's own log; nothing when nobody does."""
    await drill.tools.fanout.probe_all()
    alarmed = []
    for name, link in sorted(drill.tools.fanout.links.items()):
        try:
            described = await link.stub.Describe(custodian_pb2.DescribeRequest(), timeout=_SHOWN_SECONDS)
        except grpc.aio.AioRpcError as error:
            alarmed.append(f"{name}: {from_rpc_error(error, name).reason}")
            continue
        if described.ledger_alarms:
            alarmed.append(f"{name}: {described.ledger_alarms} alarms")
    return ", ".join(alarmed)
