"""The Triton backend: `reference`'s ops, same arguments and returns. `ops` imports it when a tensor first needs it."""

from __future__ import annotations

from functools import partial as _partial

from geko_kernels.kernels import forward as _forward
from geko_kernels.kernels import logits_grad as _logits_grad
from geko_kernels.kernels import token_stats as _token_stats
from geko_kernels.kernels.launch import on_own_device as _on_own_device
from geko_kernels.kernels.memory import room_in_two as _room_in_two
from geko_kernels.kernels.rows import clear as _clear_rows
from geko_kernels.kernels.rows import column_sums as _column_sums
from geko_kernels.kernels.rows import gradient as _gradient_rows
from geko_kernels.kernels.rows import lists as _linear_rows
from geko_kernels.kernels.rows import move as _move_rows
from geko_kernels.kernels.rows import products as _products
from geko_kernels.kernels.rows import rescale as _rescale
from geko_kernels.kernels.rows import score as _score_rows
from geko_kernels.kernels.rows import score_hopper as _score_hopper
from geko_kernels.kernels.sample_update import kernel as _sample_update

token_stats = _on_own_device(_token_stats.token_stats)
sample_update_ = _on_own_device(_sample_update.sample_update_)
loss_forward_ = _on_own_device(_forward.loss_forward_)
planned_loss_forward = _on_own_device(_forward.planned_loss_forward)
planned_logits_grad = _on_own_device(_forward.planned_logits_grad)
predicted_logits_grad = _on_own_device(_forward.predicted_logits_grad)
logits_grad = _on_own_device(_logits_grad.logits_grad)
logits_grad_ = _on_own_device(_logits_grad.logits_grad_)
scored_rows = _on_own_device(_linear_rows.scored_rows)
kept_rows_ = _on_own_device(_linear_rows.kept_rows_)
gradient_rows_ = _on_own_device(_gradient_rows.gradient_rows_)
score_rows_ = _on_own_device(_score_rows.score_rows_)
gather_rows = _on_own_device(_move_rows.gather_rows)
scatter_rows_ = _on_own_device(_move_rows.scatter_rows_)
clear_rows_ = _on_own_device(_clear_rows.clear_rows_)
column_sums = _on_own_device(_column_sums.column_sums)
rescale_ = _on_own_device(_rescale.rescale_)
weight_product_ = _on_own_device(_products.weight_product_)
hidden_product_ = _on_own_device(_products.hidden_product_)

# what `ops.direct` runs instead: DIRECT always, UNASKED unless a backend was asked for by name
DIRECT = {"sample_update_": _on_own_device(_partial(_sample_update.sample_update_, room=_room_in_two))}
UNASKED = {"score_rows_": _on_own_device(_score_hopper.score_rows_)}
