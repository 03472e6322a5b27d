"""The embedded network: authors write papers that appear at venues, in four areas.

Four areas of five venues; 800 authors of unequal diligence, each at home in one area and in a
group of about 25 in it; 2,400 papers by one to four authors. A paper is of its first author's area,
but 15% are of any; a co-author is of the first author's group, but 25% are anyone; the venue is one
of the paper's area, but 10% are any. Ten authors write nothing, and 24 papers have no venue.

Groups are too small and too mixed for who writes with whom to tell the areas; the venues tell them.
The mutual information (NMI) of the areas with four clusters of authors, who are described by where
one to three rounds of a meta-path lead (logarithms of lifts, 32 singular vectors, as in
tests/graph/test_planted.py):

  author-paper-author                .11
  author-paper-venue-paper-author    .86

The same network comes out on every platform and with every version of Python and numpy: draws are
from `random.random()`.
"""

import functools
import random

import numpy as np

from graph import network, tables

AREAS, VENUES = 4, 5  # Venues of an area.
AUTHORS, PAPERS = 800, 2400
SILENT, UNPUBLISHED = 10, 24  # Authors without a paper, papers without a venue.

_GROUP = 25  # Authors.


@functools.cache
def graph() -> network.Graph:
  """The network, of types author, paper and venue, with relations paper-author and paper-venue.

  Names are 'author 0123', 'paper 00017' and 'venue 2-3' (the third of area 2). Authors and venues
  are labelled with their areas, 'area 0' to 'area 3'.
  """
  rng = random.Random('planted graph')
  homes = [_below(rng, AREAS) for _ in range(AUTHORS)]
  groups = _groups(rng, homes)
  written: list[tuple[int, int]] = []
  published: list[tuple[int, int]] = []
  for paper in range(PAPERS):
    # Everyone but the silent is the first author of a paper; the others are mostly those of few.
    active = AUTHORS - SILENT
    first = paper if paper < active else int(rng.random() * rng.random() * active)
    area = homes[first] if rng.random() < .85 else _below(rng, AREAS)
    team = {first}
    for _ in range(_below(rng, 4)):
      known = groups[first]
      team.add(known[_below(rng, len(known))] if rng.random() < .75 else _below(rng, active))
    written += [(paper, author) for author in sorted(team)]
    at = area if rng.random() < .9 else _below(rng, AREAS)
    if paper % (PAPERS // UNPUBLISHED):
      published.append((paper, at * VENUES + _below(rng, VENUES)))
  return network.build(tables.Table(
      {'author': [f'author {i:04d}' for i in range(AUTHORS)],
       'paper': [f'paper {i:05d}' for i in range(PAPERS)],
       'venue': [f'venue {i // VENUES}-{i % VENUES + 1}' for i in range(AREAS * VENUES)]},
      [tables.Edges('paper-author', 'paper', 'author', *np.array(written).T),
       tables.Edges('paper-venue', 'paper', 'venue', *np.array(published).T)],
      {'author': {i: [f'area {home}'] for i, home in enumerate(homes)},
       'venue': {i: [f'area {i // VENUES}'] for i in range(AREAS * VENUES)}}))


def _below(rng: random.Random, n: int) -> int:
  return int(rng.random() * n)


def _groups(rng: random.Random, homes: list[int]) -> list[list[int]]:
  """The group of every author who writes: authors of the same home, with themselves."""
  active = sorted(range(AUTHORS - SILENT), key=lambda _: rng.random())
  groups = {}
  for area in range(AREAS):
    members = [author for author in active if homes[author] == area]
    for i, author in enumerate(members):
      start = i // _GROUP * _GROUP
      groups[author] = members[start:start + _GROUP]
  return [groups[author] for author in range(AUTHORS - SILENT)]
