"""Cases: scans of one patient that an expert with several roles looks at together.

Which scan has which role is found by names and headers (`sequences`), or stated by the user: patterns, or a
manifest. Series of a DICOM folder belong together by their study; files by their names, which then differ in
nothing but the words for sequences, or by what the wildcards of a pattern stand for. A case that is not
complete and clear is listed with its reason; nothing is guessed and nothing left out silently.
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
from vilam3_jax.data.dicom.headers import read_mr_header
from vilam3_jax.data.examples import path_problem
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volumes import describe_volume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

if TYPE_CHECKING:
    from vilam3_experts.inputs import Input

_MAX_MANIFEST_BYTES = 64 << 20
_MAX_SIDECAR_BYTES = 1 << 20
_LISTED = 6
_HINT = "state the roles with --roles"

Key = tuple[str, str]
"""(folder, what the names of a case have in common)."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which scans have a role.

    Attributes:
      regex: with one group for each wildcard.
      whole: it is matched with the whole path below the data folder, not with the file's name alone.
      channel: volume (from 0) of a 4-D NIfTI file, or None.
      text: as the user wrote it.
    """

    regex: re.Pattern[str]
    whole: bool
    channel: int | None
    text: str


@dataclasses.dataclass(frozen=True)
class Roles:
    """What the user states: either patterns, or the cases one by one.

    Attributes:
      patterns: role to pattern.
      cases: (name, role to (path below the data folder, channel)).
    """

    patterns: Mapping[str, Pattern] = dataclasses.field(default_factory=dict)
    cases: tuple[tuple[str, Mapping[str, tuple[str, int | None]]], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Candidate:
    item: Input
    finding: Finding
    key: Key
    frame_of_reference: str = ""

    @property
    def place(self) -> str:
        """Where scans that are not recognised are looked for: in the same study or folder."""
        return self.key[0] if self.item.series is None else self.key[1]


def parse_roles(text: str, roles: Sequence[str]) -> Roles:
    """Reads `--roles`.

    Args:
      text: 'role=PATTERN,role=PATTERN,…', where '*' and '?' stand for any text and one character, and '#2' at
        the end of a pattern for the third volume of a 4-D file; or the path of a JSON manifest
        {"cases": [{"name": …, "t1c": "path below the data folder", …}]}.
      roles: of the expert, all of which are needed.

    Raises:
      UserError: a role that is unknown, missing or stated twice, or a manifest that cannot be used.
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
    """Yields one input for each case, in order of their names.

    Args:
      items: single scans.
      roles: of the expert, in its order.
      stated: the user's patterns; None finds roles by names and headers.

    Raises:
      UserError: a scan that fits the patterns of two roles.
    """
    groups: dict[Key, list[_Candidate]] = collections.defaultdict(list)
    unknown: dict[str, list[_Candidate]] = collections.defaultdict(list)
    for item in items:
        for candidate in [_recognised(item)] if stated is None else _matched(item, stated):
            if candidate.finding.role or candidate.finding.problem:
                groups[candidate.key].append(candidate)
            elif not candidate.finding.other:
                unknown[candidate.place].append(candidate)
    known = set()
    for key in sorted(groups):
        place = groups[key][0].place
        known.add(place)
        yield _case(key, groups[key], unknown.get(place, []), roles)
    for place in sorted(set(unknown) - known):
        for candidate in unknown[place]:
            yield dataclasses.replace(candidate.item, problem=_unknown_problem(candidate.item))


def from_manifest(template: Input, stated: Roles, root: epath.Path) -> Iterator[Input]:
    """Yields the cases of a manifest.

    Args:
      template: what its scans are like, apart from name and path.
      stated: the manifest.
      root: the data folder.
    """
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
    problem = _problem(found, unclear, unknown)
    if problem:
        return dataclasses.replace(first, name=name, series=None, problem=problem)
    parts = tuple((role, _with_note(chosen[0])) for role, chosen in found.items())
    return dataclasses.replace(first, name=name, series=None, channel=None, parts=parts)


def _problem(
    found: Mapping[str, Sequence[_Candidate]], unclear: Sequence[_Candidate], unknown: Sequence[_Candidate]
) -> str:
    """Why a case cannot be used, with everything that was found; '' if it can."""
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
    shown = [f"{c.item.name} ({c.finding.problem})" if reasons else c.item.name for c in candidates[:_LISTED]]
    more = [f"{len(candidates) - _LISTED} more"] if len(candidates) > _LISTED else []
    return ", ".join([*shown, *more])


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


def _recognised(item: Input) -> _Candidate:
    if item.series is not None:
        return _recognised_series(item)
    folders, name = item.name.split("/")[:-1], item.path.name
    finding = sequences.from_name(name)
    finding = _agreed(finding, _from_sidecar(item.path))
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


def _recognised_series(item: Input) -> _Candidate:
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
    """What the BIDS sidecar beside a file says; an unreadable one says nothing, as its reader notes."""
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


def _agreed(by_name: Finding, by_sidecar: Finding) -> Finding:
    """The finding of two sources; if they contradict each other, none."""
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


def _matched(item: Input, stated: Roles) -> list[_Candidate]:
    """The roles that the user's patterns give to a scan: several only for the channels of a 4-D file."""
    found = []
    for role, pattern in stated.patterns.items():
        key = _match(item, pattern)
        if key is not None:
            chosen = dataclasses.replace(item, channel=pattern.channel)
            finding = Finding(role, f"it fits {pattern.text}")
            found.append((pattern, _Candidate(chosen, finding, key)))
    channels = [pattern.channel for pattern, _ in found]
    if len(found) > 1 and (None in channels or len(set(channels)) < len(channels)):
        fitting = " and ".join(pattern.text for pattern, _ in found)
        raise UserError(f"--roles: {item.name} fits {fitting}; write patterns that fit one role alone")
    return [candidate for _, candidate in found]


def _match(item: Input, pattern: Pattern) -> Key | None:
    """The case that a scan belongs to by a pattern: its folder, and what the wildcards stand for."""
    folder, _, name = item.name.rpartition("/")
    if item.series is not None:
        described = _recognised_series_text(item)
        fits = any(pattern.regex.fullmatch(text) for text in (item.name, name, *described))
        return ("", f"study {item.series.study}") if fits else None
    match = pattern.regex.fullmatch(item.name if pattern.whole else name)
    if match is None:
        return None
    return ("" if pattern.whole else folder, "_".join(match.groups()))


def _recognised_series_text(item: Input) -> tuple[str, ...]:
    assert item.series is not None
    header = read_mr_header(item.series.members[0].path)
    if header is None:
        return ()
    return tuple(str(header.get(name) or "") for name in ("SeriesDescription", "ProtocolName"))


def _split_channel(pattern: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)#(\d{1,4})", pattern)
    return (found[1], int(found[2])) if found else (pattern, None)


def _read_manifest(
    path: str, roles: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, tuple[str, int | None]]]]:
    try:
        content = json.loads(paths.read_bytes(path, _MAX_MANIFEST_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({str(error)[:100]}); correct it") from error
    rows = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path}: holds no list "cases"; see docs/experts_brats.md for its form')
    names = set()
    for number, row in enumerate(rows, 1):
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name or name in names:
            raise UserError(f"{path}: case {number} has no name of its own; correct it")
        names.add(name)
        if sorted(row) != sorted(["name", *roles]):
            raise UserError(
                f"{path}: case {name!r} must state {', '.join(roles)} and nothing else; correct it"
            )
        files = {role: _split_channel(str(row[role])) for role in roles}
        for file, _ in files.values():
            if problem := path_problem(file):
                raise UserError(f"{path}: case {name!r}: {problem}; give paths below the data folder")
        yield name, files
