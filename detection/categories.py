"""The categories of COCO: 80 things, and the 53 kinds of stuff of its panoptic annotations.

Names and ids are those of the files that the COCO consortium publishes (https://cocodataset.org,
annotations under CC BY 4.0): `instances_{train,val}2017.json` and `panoptic_{train,val}2017.json`.
Ids have gaps, because 91 kinds of things and 91 of stuff were planned and not all were annotated.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from core.config import UserError, choose

LABELS = ('contiguous', 'ids')

_THINGS = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat,
10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat,
18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack,
28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee, 35 skis, 36 snowboard, 37 sports ball,
38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket,
44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple,
54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair,
63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse,
75 remote, 76 keyboard, 77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink,
82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier,
90 toothbrush
"""

_STUFF = """
92 banner, 93 blanket, 95 bridge, 100 cardboard, 107 counter, 109 curtain, 112 door-stuff,
118 floor-wood, 119 flower, 122 fruit, 125 gravel, 128 house, 130 light, 133 mirror-stuff, 138 net,
141 pillow, 144 platform, 145 playingfield, 147 railroad, 148 river, 149 road, 151 roof, 154 sand,
155 sea, 156 shelf, 159 snow, 161 stairs, 166 tent, 168 towel, 171 wall-brick, 175 wall-stone,
176 wall-tile, 177 wall-wood, 178 water-other, 180 window-blind, 181 window-other, 184 tree-merged,
185 fence-merged, 186 ceiling-merged, 187 sky-other-merged, 188 cabinet-merged, 189 table-merged,
190 floor-other-merged, 191 pavement-merged, 192 mountain-merged, 193 grass-merged,
194 dirt-merged, 195 paper-merged, 196 food-other-merged, 197 building-other-merged,
198 rock-merged, 199 wall-other-merged, 200 rug-merged
"""


def _parse(text: str) -> dict[int, str]:
  pairs = (entry.strip().split(' ', 1) for entry in text.replace('\n', ' ').split(','))
  return {int(number): name for number, name in pairs}


# Category id -> name, in the order of the ids.
THINGS: dict[int, str] = _parse(_THINGS)
STUFF: dict[int, str] = _parse(_STUFF)
PANOPTIC: dict[int, str] = THINGS | STUFF

# Classes of a model whose class index is COCO's own id, as the published detectors have it: one
# more than the greatest id for things; the panoptic models have spare ones.
THING_CLASSES = 91
PANOPTIC_CLASSES = 250
_MOST_IDS = 10_000  # A class head of that many outputs is no detector's.


def is_thing(category_id: int) -> bool:
  """Whether COCO's category of that id is a countable thing; else it is stuff."""
  return category_id <= 90


@dataclasses.dataclass(frozen=True)
class Classes:
  """What the class indices of a model mean.

  Attributes:
    names: of the classes, '' for those that no category has.
    ids: class index -> category id, -1 for those that no category has.
    is_thing: whether the class is a countable thing; true for those that no category has.
  """
  names: list[str]
  ids: list[int]
  is_thing: list[bool]

  def index(self, category_ids: np.ndarray) -> np.ndarray:
    """Class indices, int32 `[n]`, of category ids, int `[n]`, all of which have a class."""
    order = np.argsort(self.ids, kind='stable')
    return order[np.searchsorted(np.asarray(self.ids), category_ids, sorter=order)].astype(np.int32)


def classes(names: Mapping[int, str], things: Mapping[int, bool], labels: str,
            where: str) -> Classes:
  """Numbers the classes.

  Args:
    names: category id -> name.
    things: category id -> whether it is a thing.
    labels: 'contiguous': the class index is the rank of the id among all ids. 'ids': it is the id
      itself, as in the published checkpoints; COCO's own 133 panoptic categories then make 250
      classes, all others as many as the greatest id plus one (91 for COCO's things).
    where: the ids come from, for the message.

  Raises:
    UserError: no such `labels`, or ids that cannot be class indices.
  """
  choose('config.data.labels', labels, LABELS)
  ids = sorted(names)
  if labels == 'contiguous':
    return Classes([names[i] for i in ids], ids, [things[i] for i in ids])
  if not 0 <= ids[0] <= ids[-1] < _MOST_IDS:
    raise UserError(f"{where}: category ids reach from {ids[0]} to {ids[-1]:,}; config.data.labels="
                    f"'ids' needs them between 0 and {_MOST_IDS - 1:,}; use 'contiguous'")
  count = PANOPTIC_CLASSES if set(ids) == set(PANOPTIC) else ids[-1] + 1
  every = range(count)
  return Classes([names.get(i, '') for i in every], [i if i in names else -1 for i in every],
                 [things.get(i, True) for i in every])


def of_count(count: int) -> Classes:
  """The classes of a model of so many when there is no data to ask: COCO's, as `classes` numbers
  them, where the count is one of COCO's; else numbers."""
  for names in (THINGS, PANOPTIC):
    for labels in LABELS:
      found = classes(names, {i: is_thing(i) for i in names}, labels, 'COCO')
      if len(found.ids) == count:
        return found
  every = list(range(count))
  return Classes([str(i) for i in every], every, [True] * count)
