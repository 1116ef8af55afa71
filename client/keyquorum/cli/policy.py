"""``keyquorum policy``: check, test, explain and analyze policies, compile controls, sign bundles. No network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyquorum.cli import output
from keyquorum_core.errors import MalformedError, Reason

if TYPE_CHECKING:
    from keyquorum.policies import Source
    from keyquorum_core.policy.explain import Explanation
    from keyquorum_core.policy.scenarios import Scenario

__all__ = ["app"]

app = typer.Typer(name="policy", help="Policies: what custodians and the coordinator decide by.", no_args_is_help=True)
controls_app = typer.Typer(name="controls", help="Controls, by classification, that compile to policies.")
app.add_typer(controls_app)

_Policies = Annotated[
    str,
    typer.Argument(
        metavar="POLICIES",
        help="A folder of *.cedar, one such file, a controls.yaml, a signed bundle, or a set's name.",
    ),
]
_Table = Annotated[
    list[Path] | None, typer.Option("--scenarios", help="A scenario table (YAML); repeat for more. A set has its own.")
]
_SignerKey = Annotated[list[Path], typer.Option("--operator-key", help="Private key file of a signer; once for each.")]


@app.command()
def check(policies: _Policies, as_json: output.JsonOption = False) -> None:
    """Validate policies against the schema, and say what they are."""
    from keyquorum.policies import load_source

    source = load_source(policies)
    lists = source.policies.lists
    rows = [
        {"policy": each.id, "effect": each.effect, "actions": list(each.actions), "file": each.file}
        for each in source.policies.policies
    ]
    if as_json:
        output.emit({"valid": True, "policies": rows, "lists": list(lists), "digest": source.digest})
        return
    output.table("Policies", ("policy", "effect", "actions", "file"), [_cells(row) for row in rows])
    output.line(f"{len(rows)} policies fit the schema. Lists they read: {', '.join(lists) or 'none'}.")


def _cells(row: dict[str, Any]) -> list[str]:
    return [", ".join(value) if isinstance(value, list) else str(value) for value in row.values()]


@app.command("test")
def run_scenarios(policies: _Policies, scenarios: _Table = None, as_json: output.JsonOption = False) -> None:
    """Run scenario tables. Exit status 1 when one does not come out as expected: a gate for CI."""
    from keyquorum.policies import load_source
    from keyquorum_core.policy.scenarios import run

    source = load_source(policies)
    outcomes = run(source.engine(), _scenarios(source, scenarios))
    failed = [each for each in outcomes if not each.passed]
    if as_json:
        output.emit({"passed": not failed, "scenarios": [each.as_dict() for each in outcomes]})
    else:
        for each in outcomes:
            found, wanted = each.decision, each.scenario
            output.line(f"{'ok    ' if each.passed else 'FAILED'}  {wanted.name}")
            if not each.passed:
                by = "" if wanted.by is None else f" by {', '.join(wanted.by) or 'nobody'}"
                output.line(f"          expected {wanted.expect}{by}")
                output.line(f"          got      {found.outcome} by {', '.join(found.policies) or 'nobody'}")
        output.line(f"{len(outcomes) - len(failed)} of {len(outcomes)} scenarios came out as expected.")
    if failed:
        raise typer.Exit(1)


def _scenarios(source: Source, tables: list[Path] | None) -> tuple[Scenario, ...]:
    from keyquorum.policies import SETS, load_scenarios, set_scenarios

    if not tables and source.name in SETS:
        return set_scenarios(source.name)
    if not tables:
        raise typer.BadParameter("no scenarios: give --scenarios FILE")
    return tuple(each for table in tables for each in load_scenarios(table))


@app.command()
def explain(
    policies: _Policies,
    scenario: Annotated[str, typer.Option(help="The scenario's name; all of them where none is given.")] = "",
    scenarios: _Table = None,
    every: Annotated[bool, typer.Option("--all", help="Also the policies that are far from matching.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Say which policies decide a scenario, and which condition of each holds or fails, with the values."""
    from keyquorum.policies import load_source
    from keyquorum_core.policy.explain import explain as explained

    source = load_source(policies)
    found = _scenarios(source, scenarios)
    chosen = [each for each in found if scenario in ("", each.name)]
    if not chosen:
        raise MalformedError(
            Reason.POLICY,
            "no such scenario",
            expected=", ".join(each.name for each in found)[:300],
            actual=scenario[:200],
        )
    told = [(each, source.engine().decide(each.request), explained(source.policies, each.request)) for each in chosen]
    if as_json:
        output.emit(
            [
                {"scenario": each.name, "decision": decision.as_dict(), **explanation.as_dict()}
                for each, decision, explanation in told
            ]
        )
        return
    for each, decision, explanation in told:
        output.line(f"{each.name}: {decision.outcome}, by {', '.join(decision.policies) or 'default'}")
        _show(explanation, every)


def _show(explanation: Explanation, every: bool) -> None:
    shown = [each for each in explanation.policies if every or len(each.unmet) <= 1]
    for each in shown:
        verdict = "matches" if each.matched else "does not match"
        output.line(f"  {each.policy.effect} {each.policy.id} ({each.policy.file}) {verdict}")
        for condition in each.conditions:
            mark = {True: "+", False: "-", None: "?"}[condition.holds]
            values = ", ".join(f"{name} = {value}" for name, value in condition.values)
            output.line(f"    {mark} {condition.text}" + (f"    [{values}]" if values else ""))
    hidden = len(explanation.policies) - len(shown)
    if hidden:
        output.line(f"  and {hidden} more of which several conditions do not hold (--all shows them)")


@app.command()
def analyze(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="POLICIES…",
            help="As for check. With --quorum: CUSTODIAN=POLICIES, or signed bundles, which name their custodians.",
        ),
    ],
    quorum: Annotated[
        Path | None, typer.Option(help="YAML or JSON with 'custodians' and 'quorum', as for 'quorum explain'.")
    ] = None,
    classification: Annotated[
        list[str] | None, typer.Option(help="Classifications to look at; by default those that the policies name.")
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Warn of policies that can never match, and of classifications that no quorum would ever release.

    Exit status 1 when there is something to warn of. docs/policy.md says how it searches, and what it cannot see.
    """
    from keyquorum.documents import load_document
    from keyquorum.policies import load_source
    from keyquorum_core.policy.analyze import classifications_of, dead_policies, unreleasable
    from keyquorum_core.quorum import load_quorum_document
    from keyquorum_protos.wire.files import read_bytes

    named = [_named(each) for each in policies]
    sources = {where: load_source(where) for _, where in named}
    findings = [(where, each) for where, source in sources.items() for each in dead_policies(source.policies)]
    if quorum is not None:
        rule = load_quorum_document(load_document(read_bytes(quorum, "quorum file"), "quorum document"))
        seats = {}
        for name, where in named:
            for custodian in (name,) if name else sources[where].custodians:
                seats[custodian] = sources[where].policies
        unknown = sorted(set(seats) - set(rule.ids))
        if unknown or not seats:
            raise MalformedError(
                Reason.POLICY,
                "whose policies these are is not clear",
                expected=f"CUSTODIAN=POLICIES for {', '.join(rule.ids)}",
                actual=", ".join(unknown)[:200] or "no custodian is named",
            )
        wanted = classification or classifications_of(seats.values())
        findings += [
            ("quorum", each)
            for each in unreleasable(
                seats, rule, wanted, progress=lambda what: None if as_json else output.note(f"searching: {what}")
            )
        ]
    if as_json:
        output.emit({"findings": [{"where": where, **each.as_dict()} for where, each in findings]})
    else:
        for where, each in findings:
            output.line(f"{where}: {each.kind} {each.about}: {each.message}" + ("" if each.proven else " (not proven)"))
        if not findings:
            output.line("Nothing to warn of.")
    if findings:
        raise typer.Exit(1)


def _named(argument: str) -> tuple[str, str]:
    name, equals, where = argument.partition("=")
    return (name, where) if equals else ("", argument)


@app.command()
def sign(
    policies: _Policies,
    cluster: Annotated[str, typer.Option(help="The cluster's name.")],
    version: Annotated[int, typer.Option(help="One more than the last bundle's of that seat.")],
    operator_key: _SignerKey,
    out: Annotated[Path, typer.Option(help="Where to write the signed bundle; never replaced.")],
    custodian: Annotated[
        list[str] | None, typer.Option(help="A custodian it is for; repeat for more. None: it is the coordinator's.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3660, help="Days until it expires.")] = 365,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Sign policies as a bundle for one seat: the coordinator's, or that of the custodians named."""
    from keyquorum.policies import load_source, sign_policy

    source = load_source(policies)
    envelope = sign_policy(
        source,
        [keys.identity for keys in _unlocked(operator_key, passphrase_file)],
        cluster=cluster,
        custodians=custodian or (),
        version=version,
        now=int(time.time()),
        days=days,
    )
    _write(out, envelope, as_json)


@app.command("sign-list")
def sign_list(
    name: Annotated[str, typer.Argument(help="export or sanctions.")],
    file: Annotated[Path, typer.Argument(help="YAML or JSON with 'entries'.")],
    cluster: Annotated[str, typer.Option(help="The cluster's name.")],
    version: Annotated[int, typer.Option(help="One more than the last list's.")],
    operator_key: _SignerKey,
    out: Annotated[Path, typer.Option(help="Where to write the signed list; never replaced.")],
    days: Annotated[int, typer.Option(min=1, max=3660, help="Days until it expires.")] = 30,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Sign an export or sanctions list."""
    from keyquorum.policies import sign_list as signed

    signers = [keys.identity for keys in _unlocked(operator_key, passphrase_file)]
    _write(out, signed(name, file, signers, cluster=cluster, version=version, now=int(time.time()), days=days), as_json)


def _unlocked(paths: list[Path], passphrase_file: Path | None) -> list[Any]:
    from keyquorum.keyfiles import unlock

    ask = output.passphrase_source(passphrase_file)
    return [unlock(path, "operator", None, ask) for path in paths]


def _write(out: Path, envelope: bytes, as_json: bool) -> None:
    from keyquorum.keyfiles import write_new
    from keyquorum_core.bulletin import peek_bulletin

    write_new(out, envelope, private=False)
    found = peek_bulletin(envelope)
    if as_json:
        output.emit({"file": str(out), "kind": found.kind, "version": found.version, "digest": found.digest})
    else:
        output.line(f"Wrote {found.name}, digest {found.digest}, to {out}")


# -- controls ----------------------------------------------------------------------------------------------------------


@controls_app.command("list")
def controls_list(as_json: output.JsonOption = False) -> None:
    """The sets of controls that come with keyquorum."""
    from keyquorum.policies import SETS, load_controls

    found = [load_controls(name) for name in SETS]
    if as_json:
        output.emit(
            [
                {"name": each.name, "title": each.title, "classifications": [row.classification for row in each.rows]}
                for each in found
            ]
        )
        return
    output.table(
        "Controls",
        ("set", "title", "classifications"),
        [(each.name, each.title, ", ".join(row.classification for row in each.rows)) for each in found],
    )


_Controls = Annotated[str, typer.Argument(metavar="CONTROLS", help="A controls.yaml, or the name of a shipped set.")]


@controls_app.command("show")
def controls_show(controls: _Controls) -> None:
    """The controls as a table in Markdown, for those who answer for them."""
    from keyquorum.policies import load_controls
    from keyquorum_core.policy.controls_table import table

    typer.echo(table(load_controls(controls)), nl=False)


@controls_app.command("compile")
def controls_compile(
    controls: _Controls,
    out: Annotated[
        Path, typer.Option(help="Folder to write the policies and the table into; files are never replaced.")
    ],
    as_json: output.JsonOption = False,
) -> None:
    """Compile controls to policies (*.cedar) and a table (CONTROLS.md)."""
    from keyquorum.keyfiles import write_new
    from keyquorum.policies import compile_set, load_controls
    from keyquorum_core.errors import UnavailableError
    from keyquorum_core.policy.controls_table import table

    texts = {**compile_set(controls), "CONTROLS.md": table(load_controls(controls))}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{out} can't be made", actual=error.strerror) from None
    for name, text in texts.items():
        write_new(out / name, text.encode(), private=False)
    if as_json:
        output.emit({"folder": str(out), "files": sorted(texts)})
    else:
        output.line(f"Wrote {', '.join(sorted(texts))} to {out}")
