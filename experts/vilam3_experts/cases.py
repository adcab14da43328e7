"""Cases: scans of one patient that an expert with several roles analyses together.

The roles of scans are detected from names and headers (`sequences`), or stated by the user as patterns or in
a manifest. DICOM series form a case if they belong to one study. Files form a case if their names differ only
in the words for sequences, or if the wildcards of the patterns match the same text. An incomplete or
ambiguous case is listed with its reason; nothing is guessed or dropped silently.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from vilam3_experts import sequences
from vilam3_experts.sequences import Finding
from vilam3_experts.text import listed
from vilam3_jax.data.dicom.headers import read_mr_header
from vilam3_jax.data.examples import path_problem
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volumes import describe_volume
from vilam3_jax.datasets.user_data import read_json
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

if TYPE_CHECKING:
    from vilam3_experts.inputs import Input

_MAX_SIDECAR_BYTES = 1 << 20
_LISTED = 6
_HINT = "state the roles with --roles"

Key = tuple[str, str]
"""(folder, common part of the names) of a case."""

ScanFile = tuple[str, int | None]
"""(path below the data folder, channel)."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern for the scans of one role, with one regex group per wildcard.

    `whole` matches it with the whole path below the data folder instead of the file name; `channel` selects a
    volume of a 4-D NIfTI file; `text` is the user's notation.
    """

    regex: re.Pattern[str]
    whole: bool
    channel: int | None
    text: str


@dataclasses.dataclass(frozen=True)
class Roles:
    """The user's statement: either patterns by role, or (name, files by role) of each case."""

    patterns: Mapping[str, Pattern] = dataclasses.field(default_factory=dict)
    cases: tuple[tuple[str, Mapping[str, ScanFile]], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Candidate:
    item: Input
    finding: Finding
    key: Key
    frame_of_reference: str = ""

    @property
    def place(self) -> str:
        """The study or folder, to which unrecognised scans are attributed."""
        return self.key[0] if self.item.series is None else self.key[1]


def parse_roles(text: str, roles: Sequence[str]) -> Roles:
    """Parses `--roles`, which must state every role of the expert once; raises `UserError` otherwise.

    `text` is 'role=PATTERN,role=PATTERN,…', where '*' matches any text, '?' one character, and the suffix
    '#2' selects the third volume of a 4-D file; or the path of a JSON manifest {"cases": [{"name": …, "t1c":
    "path below the data folder", …}]}.
    """
    if text.endswith(".json"):
        return Roles(cases=tuple(_read_manifest(text, roles)))
    patterns: dict[str, Pattern] = {}
    for part in text.split(","):
        role, equals, pattern = part.strip().partition("=")
        if not equals or role not in roles or role in patterns or not pattern:
            listed = ",".join(f"{role}=PATTERN" for role in roles)
            raise UserError(f"--roles: {part.strip()!r} does not state one of the roles; write {listed}")
        plain, channel = _split_channel(pattern)
        regex = re.compile(re.escape(plain).replace(r"\*", "(.*)").replace(r"\?", "(.)"), re.IGNORECASE)
        patterns[role] = Pattern(regex, "/" in plain, channel, pattern)
    if missing := [role for role in roles if role not in patterns]:
        raise UserError(f"--roles: no pattern for {', '.join(missing)}; state all of {', '.join(roles)}")
    return Roles({role: patterns[role] for role in roles})


def group(items: Iterable[Input], roles: Sequence[str], stated: Roles | None) -> Iterator[Input]:
    """Yields one input per case, sorted by name; without patterns, roles are detected.

    Raises `UserError` if a scan matches the patterns of two roles.
    """
    groups: dict[Key, list[_Candidate]] = collections.defaultdict(list)
    unknown: dict[str, list[_Candidate]] = collections.defaultdict(list)
    for item in items:
        for candidate in [_classify(item)] if stated is None else _match_patterns(item, stated):
            if candidate.finding.role or candidate.finding.problem:
                groups[candidate.key].append(candidate)
            elif not candidate.finding.other:
                unknown[candidate.place].append(candidate)
    known = {candidates[0].place for candidates in groups.values()}
    for key, candidates in sorted(groups.items(), key=lambda group: group[0]):
        yield _case(key, candidates, unknown.get(candidates[0].place, []), roles)
    for place in sorted(set(unknown) - known):
        for candidate in unknown[place]:
            yield dataclasses.replace(candidate.item, problem=_unknown_problem(candidate.item))


def from_manifest(template: Input, stated: Roles, root: epath.Path) -> Iterator[Input]:
    """Yields the cases of a manifest, whose scans are like `template` except for name, path and channel."""
    for name, files in stated.cases:
        parts = tuple(
            (role, dataclasses.replace(template, name=file, path=root / file, channel=channel))
            for role, (file, channel) in files.items()
        )
        yield dataclasses.replace(template, name=name, path=root, parts=parts)


def _case(
    key: Key, candidates: Sequence[_Candidate], unknown: Sequence[_Candidate], roles: Sequence[str]
) -> Input:
    found: dict[str, list[_Candidate]] = {role: [] for role in roles}
    unclear = []
    for candidate in candidates:
        if candidate.finding.role in found:
            found[candidate.finding.role].append(candidate)
        elif candidate.finding.problem:
            unclear.append(candidate)
    first = candidates[0].item
    folder = key[0]
    if first.series is not None:
        folder = os.path.commonpath([candidate.item.name.rpartition("/")[0] for candidate in candidates])
    name = "/".join(part for part in (folder, key[1]) if part) or "case"
    if problem := _problem(found, unclear, unknown):
        return dataclasses.replace(first, name=name, series=None, problem=problem)
    parts = tuple((role, _with_note(chosen[0])) for role, chosen in found.items())
    return dataclasses.replace(first, name=name, series=None, channel=None, parts=parts)


def _problem(
    found: Mapping[str, Sequence[_Candidate]], unclear: Sequence[_Candidate], unknown: Sequence[_Candidate]
) -> str:
    """Why a case cannot be used, with all scans that were found; '' if it can."""
    missing = [role for role, chosen in found.items() if not chosen]
    several = [role for role, chosen in found.items() if len(chosen) > 1]
    if not missing and not several:
        return _frames_problem({role: chosen[0] for role, chosen in found.items()})
    faults = [f"no {', no '.join(missing)}"] if missing else []
    faults += [f"several for {', '.join(several)}"] if several else []
    there = [f"{role}: {_names(chosen)}" for role, chosen in found.items() if chosen]
    there += [f"unclear: {_names(unclear, reasons=True)}"] if unclear else []
    there += [f"not recognised: {_names(unknown)}"] if unknown else []
    return f"{' and '.join(faults)}; found {'; '.join(there) or 'nothing'}; {_HINT}"


def _frames_problem(chosen: Mapping[str, _Candidate]) -> str:
    frames = collections.defaultdict(list)
    for role, candidate in chosen.items():
        if candidate.frame_of_reference:
            frames[candidate.frame_of_reference].append(role)
    if len(frames) < 2:
        return ""
    apart = " and ".join(", ".join(roles) for roles in frames.values())
    return (
        f"{apart} have different frames of reference, so their positions cannot be compared; "
        "register them first"
    )


def _names(candidates: Sequence[_Candidate], *, reasons: bool = False) -> str:
    names = [f"{c.item.name} ({c.finding.problem})" if reasons else c.item.name for c in candidates]
    return listed(names, _LISTED)


def _with_note(candidate: _Candidate) -> Input:
    finding = candidate.finding
    note = f"is {candidate.item.name}" + (f", because {finding.evidence}" if finding.evidence else "")
    if finding.assumed:
        note += "; nothing says that contrast was given, so it is taken as native"
    return dataclasses.replace(candidate.item, notes=(note,))


def _unknown_problem(item: Input) -> str:
    problem = f"neither its name nor its header tells which MRI sequence it is; {_HINT}"
    if item.series is not None:
        return problem
    try:
        describe_volume(item.path)
    except UnavailableError:
        raise
    except UserError as error:
        if "4-D data" in str(error):
            return f"a 4-D file does not tell which sequence a channel is; {_HINT}, such as t1c=*.nii.gz#2"
        return str(error)
    return problem


def _classify(item: Input) -> _Candidate:
    if item.series is not None:
        return _classify_series(item)
    folders, name = item.name.split("/")[:-1], item.path.name
    finding = sequences.from_name(name)
    finding = _combined(finding, _from_sidecar(item.path))
    depth = len(folders)
    for place in reversed(range(len(folders))):
        of_folder = sequences.from_name(folders[place])
        if of_folder.role is None:
            continue
        if finding == Finding():
            evidence = of_folder.evidence.replace("its name", "its folder")
            finding = dataclasses.replace(of_folder, evidence=evidence)
        if of_folder.role == finding.role:
            depth = place
        break
    rest = sequences.bids_case(name) or sequences.without_sequence(name)
    folder = "/".join(folders[:depth])
    # A folder named as its files adds nothing to the name of the case.
    if depth and sequences.without_sequence(folders[depth - 1]) == rest:
        rest = ""
    return _Candidate(item, finding, (folder, rest))


def _classify_series(item: Input) -> _Candidate:
    series = item.series
    assert series is not None
    key = ("", f"study {series.study}")
    if series.modality not in ("MR", UNKNOWN):
        return _Candidate(item, Finding(other=f"modality {series.modality}"), key)
    if series.localizer:
        return _Candidate(item, Finding(other="a localizer"), key)
    path = series.members[0].path
    header = read_mr_header(path)
    if header is None:
        return _Candidate(item, Finding(), key)
    frame = str(header.get("FrameOfReferenceUID") or "")
    return _Candidate(item, sequences.from_dicom(header, path), key, frame)


def _from_sidecar(path: epath.Path) -> Finding:
    """Evidence of the BIDS sidecar of a file; an unreadable sidecar counts as missing."""
    sidecar = path.parent / f"{sequences.stem(path.name)}.json"
    if not sidecar.exists():
        return Finding()
    try:
        fields: Any = json.loads(paths.read_bytes(sidecar, _MAX_SIDECAR_BYTES))
    except UnavailableError:
        raise
    except (UserError, ValueError, RecursionError):
        return Finding()
    return sequences.from_sidecar(fields) if isinstance(fields, dict) else Finding()


def _combined(by_name: Finding, by_sidecar: Finding) -> Finding:
    """Combines the findings of two sources; contradictions give a problem instead of a role."""
    if by_name.other or by_name.problem or not (by_sidecar.role or by_sidecar.problem or by_sidecar.other):
        return by_name
    if by_name.role is None or by_name.role == by_sidecar.role:
        evidence = "; ".join(filter(None, [by_name.evidence, by_sidecar.evidence]))
        return dataclasses.replace(
            by_sidecar, evidence=evidence, assumed=by_name.assumed and by_sidecar.assumed
        )
    if by_sidecar.role == "t1c" and by_name.assumed:
        return by_sidecar
    if by_sidecar.assumed and by_name.role == "t1c":
        return by_name
    problem = by_sidecar.problem or f"its JSON file says {by_sidecar.role or by_sidecar.other}"
    return Finding(evidence=by_name.evidence, problem=f"named as {by_name.role}, but {problem}")


def _match_patterns(item: Input, stated: Roles) -> list[_Candidate]:
    """The roles of a scan by the user's patterns; more than one only for the channels of a 4-D file."""
    found = []
    for role, pattern in stated.patterns.items():
        key = _match(item, pattern)
        if key is not None:
            chosen = dataclasses.replace(item, channel=pattern.channel)
            finding = Finding(role, f"it matches {pattern.text}")
            found.append((pattern, _Candidate(chosen, finding, key)))
    channels = [pattern.channel for pattern, _ in found]
    if len(found) > 1 and (None in channels or len(set(channels)) < len(channels)):
        matching = " and ".join(pattern.text for pattern, _ in found)
        raise UserError(f"--roles: {item.name} matches {matching}; write patterns that match one role only")
    return [candidate for _, candidate in found]


def _match(item: Input, pattern: Pattern) -> Key | None:
    """The case of a scan by a pattern: its folder, and the text that the wildcards match."""
    folder, _, name = item.name.rpartition("/")
    if item.series is not None:
        header = read_mr_header(item.series.members[0].path) or {}
        described = (str(header.get(key) or "") for key in ("SeriesDescription", "ProtocolName"))
        if any(pattern.regex.fullmatch(text) for text in (item.name, name, *described)):
            return ("", f"study {item.series.study}")
        return None
    match = pattern.regex.fullmatch(item.name if pattern.whole else name)
    return None if match is None else ("" if pattern.whole else folder, "_".join(match.groups()))


def _split_channel(pattern: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)#(\d{1,4})", pattern)
    return (found[1], int(found[2])) if found else (pattern, None)


def _read_manifest(path: str, roles: Sequence[str]) -> Iterator[tuple[str, Mapping[str, ScanFile]]]:
    content = read_json(path)
    rows = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path}: has no list "cases"; see docs/experts_brats.md for its form')
    names = set()
    for number, row in enumerate(rows, 1):
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name or name in names:
            raise UserError(f"{path}: case {number} has no unique name; correct it")
        names.add(name)
        if sorted(row) != sorted(["name", *roles]):
            raise UserError(f"{path}: case {name!r} must state only {', '.join(roles)}; correct it")
        files = {role: _split_channel(str(row[role])) for role in roles}
        for file, _ in files.values():
            if problem := path_problem(file):
                raise UserError(f"{path}: case {name!r}: {problem}; give paths below the data folder")
        yield name, files
