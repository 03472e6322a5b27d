"""Stacks of cells against torch: the same weights give the same states and gradients.

torch's GRU has its reset gate after the product (cuDNN's form), so it is another cell than ours.
"""

import jax
import numpy as np
import pytest

from tests.translation import test_cells
from translation import cells

torch = pytest.importorskip('torch')

pytestmark = pytest.mark.parity

INPUTS, WIDTH, LENGTHS = 5, 6, (7, 4, 1)


def port(params, theirs):
  """Copies our parameters into a torch module: gates are in the same order, matrices transposed."""
  with torch.no_grad():
    for name, layer in params.items():
      direction, number = name.split('_')
      end = f'_l{number}' + ('_reverse' if direction == 'backward' else '')
      for ours, its in (('kernel', 'weight_ih'), ('recurrent', 'weight_hh'), ('bias', 'bias_ih')):
        getattr(theirs, its + end).copy_(torch.tensor(np.array(layer[ours].T)))
      getattr(theirs, 'bias_hh' + end).zero_()


@pytest.mark.parametrize('kind, bidirectional', [('lstm', False), ('lstm', True), ('rnn', True)])
def test_states_and_gradients(kind, bidirectional):
  stack = cells.Stack(kind, INPUTS, WIDTH, layers=2, bidirectional=bidirectional)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 7, INPUTS)).astype(np.float32)
  mask = np.arange(7) < np.array(LENGTHS)[:, None]
  probe = rng.normal(size=(3, 7, WIDTH * (2 if bidirectional else 1))).astype(np.float32)
  params = test_cells.made(stack, x)
  theirs = (torch.nn.LSTM if kind == 'lstm' else torch.nn.RNN)(
      INPUTS, WIDTH, 2, batch_first=True, bidirectional=bidirectional)
  port(params, theirs)

  read = torch.tensor(x, requires_grad=True)
  packed = torch.nn.utils.rnn.pack_padded_sequence(read, torch.tensor(LENGTHS), batch_first=True)
  out, last = theirs(packed)
  out, _ = torch.nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
  (out * torch.tensor(probe)).sum().backward()

  def loss(params, x):
    out, finals = stack.apply({'params': params}, x, mask=mask)
    return (out * probe).sum(), (out, finals)
  grads, (made, finals) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
  np.testing.assert_allclose(made, out.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(grads[1], read.grad.numpy(), atol=1e-5)
  for part, want in enumerate(last if kind == 'lstm' else [last]):
    ends = np.stack([state[part] for ways in finals for state in ways])
    np.testing.assert_allclose(ends, want.detach().numpy(), atol=1e-5)
  wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
  for number in range(2):
    for name, its in (('kernel', 'weight_ih'), ('recurrent', 'weight_hh'), ('bias', 'bias_ih')):
      np.testing.assert_allclose(grads[0][f'forward_{number}'][name], wanted[f'{its}_l{number}'].T,
                                 rtol=1e-4, atol=1e-5)
