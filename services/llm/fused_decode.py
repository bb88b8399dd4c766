"""Runs a step that has only decodes as one kernel call through all layers.

As single operations it would be over two hundred calls, between which the other threads fall asleep
(docs/performance.md has figures). Ranks sum their shares twice per layer, so they make two calls
per layer.
"""

from ctypes import CDLL, addressof, byref

import numpy as np
import torch
from torch import Tensor

from compute.kernels.operations import can_attend_blocks, kernels_for, new_partials
from compute.kernels.structures import DecoderStruct, LayerStruct, StepStruct, WeightsStruct
from compute.products import Product
from services.llm.batch import Batch
from services.llm.decoder import Decoder, Layer
from services.llm.language_model import LanguageModel
from services.llm.step_plan import StepPlan

MAX_ROWS = 64
"""Larger batches are bound by arithmetic, so saving calls does not matter to them."""


class FusedDecode:
    """One model over one KV cache [num_layers, 2, num_blocks, block_size, K, D]."""

    def __init__(self, kernels: CDLL, model: Decoder, kv_cache: Tensor) -> None:
        self._kernels = kernels
        self._model = model
        self._kv_cache = kv_cache
        self._layers = (LayerStruct * len(model.layers))(*map(structure_of, model.layers))
        layer = model.layers[0]
        self._decoder = DecoderStruct(
            layers=addressof(self._layers),
            norm=model.norm.data_ptr(),
            head=weights_of(model.head),
            num_layers=len(model.layers),
            width=model.sizes.hidden_size,
            num_heads=model.num_local_heads,
            num_kv_heads=model.num_local_kv_heads,
            dim=model.sizes.head_dim,
            is_share=model.shard.world_size > 1,
            eps=model.norm_eps,
        )
        self._max_rows = min(MAX_ROWS, *(product.max_kernel_rows for product in products_of(model)))
        widths = [
            weights_of(layer.qkv.product).num_outputs,
            weights_of(layer.gate_up.product).num_outputs,
            model.sizes.hidden_size,
            weights_of(layer.o.product).num_inputs,
            weights_of(layer.down.product).num_inputs,
        ]
        self._workspace = kv_cache.new_empty(self._max_rows * sum(widths))

    @classmethod
    def of(cls, model: LanguageModel, kv_cache: Tensor) -> "FusedDecode | None":
        """Return None unless the model is a plain decoder and each of its parts has a kernel."""
        if not isinstance(model, Decoder) or not model.fits_fused_decode:
            return None
        kernels = kernels_for(kv_cache)
        if kernels is None or not can_attend_blocks(model.num_local_heads, kv_cache):
            return None
        fits = all(
            product.packed is not None and product.packed.kernels is kernels
            for product in products_of(model)
        )
        return cls(kernels, model, kv_cache) if fits else None

    def takes(self, plan: StepPlan) -> bool:
        """Whether every sequence has one new token, whose logits are wanted.

        A step that has rows of items, or an adapter, takes the slow path, because a layer may
        compute something else for them.
        """
        if len(plan.item_rows) or plan.adapters.any():
            return False
        return len(plan.query_lens) == len(plan.sampled_rows) == plan.num_tokens <= self._max_rows

    def run(self, plan: StepPlan, x: Tensor, batch: Batch) -> Tensor:
        """[T, hidden], which is overwritten -> float32 logits [T, vocab_size]."""
        cos, signed_sin = self._model.rotary(batch)
        scale = self._model.scale_of(batch)
        slots, tables, contexts = (
            np.ascontiguousarray(array, np.int64)
            for array in (plan.slot_mapping, plan.block_tables, plan.context_lens)
        )
        partials = new_partials(contexts, self._model.num_local_heads, self._model.sizes.head_dim)
        step = StepStruct(
            cos=cos.data_ptr(),
            signed_sin=signed_sin.data_ptr(),
            query_scale=None if scale is None else scale.data_ptr(),
            slots=slots.ctypes.data,
            tables=tables.ctypes.data,
            contexts=contexts.ctypes.data,
            table_stride=tables.shape[1],
            num_seqs=len(x),
            cache=self._kv_cache.data_ptr(),
            layer_stride=self._kv_cache.stride(0),
            values_at=self._kv_cache.stride(1),
            block_size=self._kv_cache.shape[3],
            partials=partials.data_ptr(),
        )
        logits = x.new_empty(len(x), self._decoder.head.num_outputs)
        num_parts = 2 * len(self._layers)
        if self._model.shard.world_size == 1:
            self._compute(step, x, logits, 0, num_parts + 1)
            return logits.float()
        share = torch.empty_like(x)
        for part in range(num_parts):
            self._compute(step, x, share, part, part + 1)
            x += self._model.shard.all_reduce(share)
        self._compute(step, x, logits, num_parts, num_parts + 1)
        return self._model.shard.all_gather(logits.float())

    def _compute(self, step: StepStruct, x: Tensor, y: Tensor, first: int, last: int) -> None:
        """Run the parts from `first` to before `last`.

        The parts are attention and MLP of each layer in turn, then the head.
        """
        addresses = (x.data_ptr(), self._workspace.data_ptr(), y.data_ptr())
        self._kernels.decode(
            byref(self._decoder), byref(step), *addresses, first, last, torch.get_num_threads()
        )


def products_of(model: Decoder) -> list[Product]:
    return [
        model.head,
        *(
            projection.product
            for layer in model.layers
            for projection in (layer.qkv, layer.o, layer.gate_up, layer.down)
        ),
    ]


def weights_of(product: Product) -> WeightsStruct:
    assert product.packed is not None
    return product.packed.structure


def structure_of(layer: Layer) -> LayerStruct:
    return LayerStruct(
        input_norm=layer.input_norm.data_ptr(),
        mlp_norm=layer.mlp_norm.data_ptr(),
        qkv=weights_of(layer.qkv.product),
        o=weights_of(layer.o.product),
        gate_up=weights_of(layer.gate_up.product),
        down=weights_of(layer.down.product),
    )
