"""The paper's ablations as one command: a run a variant, then a table and a picture of them.

    python -m recsys.ablations --config=configs/bert4rec.py --workdir=runs/ablations
        [--only=default,no_positions] [--seeds=3] [--config.key=value ...]

How it goes about it is in `core.sweep`.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from core import sweep

# Sections 4.4 to 4.8: table 3 (one mask), table 5 and figures 3 and 4. Heads are 32 wide. Every
# config has two layers, two heads and width 64. Keys are those of config.model.
VARIANTS: dict[str, dict[str, object]] = {
    'default': {}, 'no_positions': {'positions': False}, 'no_residual': {'residual': False},
    'no_dropout': {'dropout': 0., 'attention_dropout': 0.}, 'one_mask': {'max_masks': 1},
    **{f'layers{n}': {'depth': n} for n in (1, 3, 4)},
    **{f'heads{n}': {'heads': n} for n in (1, 4, 8)},
    **{f'width{n}': {'width': n, 'heads': max(n // 32, 1)} for n in (16, 32, 128, 256)},
    **{f'mask{share}': {'mask_rate': share, 'max_masks': 10_000}
       for share in (.1, .2, .4, .6, .8)}}


def picture(found: sweep.Found, workdir: pathlib.Path) -> None:
  """Bars of NDCG@10, a variant each, in two protocols; the line is the default's."""
  figure = Figure(figsize=(9, .5 + .32 * len(found)), layout='constrained')
  for axes, shown in zip(figure.subplots(1, 2, sharey=True),
                         ('test/unseen/NDCG@10', 'test/pop100/NDCG@10')):
    values = [[end[shown] for end in ends] for ends in found.values()]
    axes.barh(list(found), [np.mean(v) for v in values], color='C0', alpha=.7)
    for row, each in enumerate(values):
      axes.plot(each, [row] * len(each), 'k.', markersize=4)
    if 'default' in found:
      axes.axvline(np.mean(values[list(found).index('default')]), color='black', linewidth=.8)
    axes.set_title(shown.replace('/', ' ', 1), fontsize=10)
    axes.spines[['top', 'right']].set_visible(False)
  axes.invert_yaxis()
  figure.savefig(workdir / 'ablations.png', dpi=110)


_SWEEP = sweep.Sweep(
    {name: {f'model.{key}': value for key, value in values.items()}
     for name, values in VARIANTS.items()},
    measures='test/(unseen|pop100)/(HR|NDCG)@10', picture=picture)


def main(argv: Sequence[str]) -> int:
  return sweep.main(argv, 'python -m recsys.ablations', __doc__, lambda config, more: _SWEEP)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
