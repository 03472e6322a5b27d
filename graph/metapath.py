"""Meta-paths: which types and relations a walk goes through, and how they are written.

  author-paper-venue-paper-author        types, and between them the one relation that joins them
  APVPA                                  the same by the first letters of the types
  package-[depends]->package-tag         a relation by its name, in its direction
  package<-[depends]-package             against it
  package-[depends]-package              either way
  *                                      no types: any edge either way (DeepWalk)

Several paths have a comma between them, and walks take them by turns: PMP,PTP.

A path that ends with the type it begins with is repeated: its last node is the first of the next
round, so APVPA walks A P V P A P V P A ... (section 3.2).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from core.config import UserError

UNIFORM = '*'


@dataclasses.dataclass(frozen=True)
class Link:
  """What a path needs to know of a relation.

  Attributes:
    name: unique among relations.
    source, target: types.
    edges: how many there are.
    weighted: whether some edges count more than others.
  """
  name: str
  source: str
  target: str
  edges: int
  weighted: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of a path: `relation` is an index into the links, -1 for any of them; `direction` is
  '>' along it, '<' against it, '-' either way."""
  relation: int
  direction: str


@dataclasses.dataclass(frozen=True)
class MetaPath:
  """A path that was held against the relations that there are.

  Attributes:
    text: as it was written.
    types: of its nodes, one more than steps; empty for `UNIFORM`.
    steps: in order.
    cyclic: whether it can be repeated.
  """
  text: str
  types: tuple[str, ...]
  steps: tuple[Step, ...]

  @property
  def cyclic(self) -> bool:
    return not self.types or self.types[0] == self.types[-1]

  def type_at(self, index: int) -> str:
    """Type of node `index` of a walk; '' when any."""
    return self.types[index % len(self.steps)] if self.cyclic and self.types else (
        self.types[index] if self.types else '')

  def positions(self, length: int, keep: Sequence[str]) -> list[int]:
    """Which nodes of a walk are its first `length` tokens.

    Args:
      length: tokens a walk.
      keep: types that become tokens; all when empty. The paper's text keeps every node, its
        released code drops the papers of APVPA.

    Raises:
      UserError: a type that is not on the path, or a path that has too few nodes and cannot be
        repeated.
    """
    if keep and not self.types:
      raise UserError(f"config.model.keep={list(keep)} needs a meta-path; '*' keeps every node")
    for name in keep:
      if name not in self.types:
        raise UserError(f'config.model.keep: {name!r} is not on the meta-path {self.text!r}; it '
                        f'has {", ".join(dict.fromkeys(self.types))}')
    found: list[int] = []
    index = 0
    while len(found) < length:
      if not self.cyclic and index == len(self.types):
        raise UserError(
            f'config.model.length={length}: the meta-path {self.text!r} begins with '
            f'{self.types[0]!r} and ends with {self.types[-1]!r}, so it cannot be repeated, and '
            f'has {len(found)} tokens; close it to a circle or set '
            f'config.model.length={len(found)}')
      if not keep or self.type_at(index) in keep:
        found.append(index)
      index += 1
    return found


def parse(text: str, types: Sequence[str], links: Sequence[Link]) -> MetaPath:
  """Reads a meta-path and finds its relations.

  Args:
    text: see above.
    types: that there are.
    links: relations that there are.

  Raises:
    UserError: not a path, an unknown type or relation, a step that no relation makes or that
      several do; the message names the step.
  """
  what = f'config.model.metapath={text!r}'
  if text == UNIFORM:
    return MetaPath(text, (), (Step(-1, '-'),))
  if not text:
    raise UserError(f'{what} is empty; a meta-path has at least one step, such as '
                    f'{_example(links)}')
  names, arrows = _split(text, types, what)
  for name in names:
    if name not in types:
      raise UserError(f'{what}: there is no type {name!r}; types: {", ".join(types)}')
  if not arrows:
    raise UserError(f'{what} is one node; a meta-path has at least one step, such as '
                    f'{_example(links)}')
  steps = tuple(_step(source, target, arrow, links, f'{what}, step {number}')
                for number, (source, target, arrow) in enumerate(zip(names, names[1:], arrows), 1))
  return MetaPath(text, tuple(names), steps)


def _split(text: str, types: Sequence[str], what: str) -> tuple[list[str], list[tuple[str, str]]]:
  """Types, and between them (relation or '', direction)."""
  if '-' not in text and text not in types:
    initials: dict[str, list[str]] = {}
    for name in types:
      initials.setdefault(name[0].lower(), []).append(name)
    names = []
    for letter in text:
      fitting = initials.get(letter.lower(), [])
      if len(fitting) != 1:
        has = f'{len(fitting)} types begin with it' if fitting else 'no type begins with it'
        raise UserError(f'{what}: {letter!r}: {has}; types: {", ".join(types)}; a path may also be '
                        'written with whole names, type-type-type')
      names.append(fitting[0])
    return names, [('', '-')] * (len(names) - 1)
  # The names of types may have a '-' themselves, so the longest that ends there is taken.
  known = '|'.join(re.escape(name) for name in sorted(types, key=len, reverse=True))
  node = re.compile(rf'((?:{known})(?=[-<]|$)|[^-<>\[\]]+)')
  arrow = re.compile(r'(<?)-(?:\[([^\]]+)\]-)?(>?)')
  names, arrows, at = [], [], 0
  while True:
    found = node.match(text, at)
    if not found:
      raise UserError(f'{what}: a type should follow {text[:at]!r}')
    names.append(found[1])
    at = found.end()
    if at == len(text):
      return names, arrows
    found = arrow.match(text, at)
    if not found or (found[1] and found[3]):
      raise UserError(f"{what}: '-', '-[relation]-', '-[relation]->' or '<-[relation]-' should "
                      f'follow {text[:at]!r}')
    arrows.append((found[2] or '', found[1] or found[3] or '-'))
    at = found.end()


def _step(source: str, target: str, arrow: tuple[str, str], links: Sequence[Link],
          what: str) -> Step:
  relation, direction = arrow
  if relation and relation not in {link.name for link in links}:
    raise UserError(f'{what}: there is no relation {relation!r}; relations: {_listed(links)}')
  fitting = []
  for index, link in enumerate(links):
    if relation and link.name != relation:
      continue
    along, against = (link.source, link.target) == (source, target), (
        link.target, link.source) == (source, target)
    if direction == '-' and along and against:
      fitting.append(Step(index, '-'))
    elif along and direction in '->':
      fitting.append(Step(index, '>'))
    elif against and direction in '-<':
      fitting.append(Step(index, '<'))
  if not fitting:
    named = f'{relation!r} does not join' if relation else 'no relation joins'
    raise UserError(f'{what}: {named} {source!r} to {target!r}'
                    f'{" in that direction" if direction != "-" else ""}; relations: '
                    f'{_listed(links)}')
  if len(fitting) > 1:
    some = ', '.join(f'{source}-[{links[step.relation].name}]-{target}' for step in fitting)
    raise UserError(f'{what}: several relations join {source!r} to {target!r}; name one: {some}')
  return fitting[0]


def _listed(links: Sequence[Link]) -> str:
  return ', '.join(f'{link.source}-[{link.name}]->{link.target}' for link in links)


def _example(links: Sequence[Link]) -> str:
  source, target = (links[0].source, links[0].target) if links else ('author', 'paper')
  return f'{source}-{target}-{source}'


def links_of(relations: Sequence) -> tuple[Link, ...]:
  """The links of a graph's relations (`network.Relation`)."""
  return tuple(Link(r.name, r.source, r.target, len(r.col), r.weight is not None)
               for r in relations)


def links_from(nodes: Mapping[str, int], edges: Sequence[tuple[str, str, int]]) -> tuple[Link, ...]:
  """The links of a graph that is not here: (source, target, edges) each, named `source-target`."""
  for source, target, _ in edges:
    for name in (source, target):
      if name not in nodes:
        raise UserError(f'config.model.edges: {name!r} is not in config.model.nodes, which has '
                        f'{", ".join(nodes)}')
  return tuple(Link(f'{source}-{target}', source, target, count) for source, target, count in edges)
