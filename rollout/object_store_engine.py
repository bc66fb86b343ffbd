"""The worker side of the object-store weight transfer: the class that vLLM instantiates beside the model."""

import hashlib
import math
import mmap
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket: the file with its bytes and the tensors in it. `complete` says that an update must bring every weight."""

    path: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    complete: bool = True


class ObjectStoreWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads buckets from files into the model with vLLM's layerwise reload (checkpoint names, fused and tied weights, packing)."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._digests, self._tensors, self._elements, self._complete = [], 0, 0, True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with open(update_info.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._digests.append(hashlib.sha256(data).hexdigest())
            weights = [
                # Copied, because layerwise reload keeps the tensors of a layer that is not whole yet, and the file goes away.
                (name, _tensor(data, dtype, shape, offset))
                for name, dtype, shape, offset in zip(update_info.names, update_info.dtype_names, update_info.shapes, update_info.offsets)
            ]
        self._tensors += len(weights)
        self._elements += sum(tensor.numel() for _, tensor in weights)
        self._complete = self._complete and update_info.complete
        self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        unfinished, tied = _unfinished_layers(self.model, self._complete)
        if unfinished:
            raise ValueError(
                f"the weight update left {len(unfinished)} layers without some of their weights: {', '.join(unfinished[:8])}; "
                "every parameter of the policy must be sent between start and finish"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in tied:
            # A head tied to the embeddings gets no weights of its own, so vLLM leaves it with the packed copy of the old ones.
            layer.quant_method.process_weights_after_loading(layer)

    def received(self) -> dict:
        return {"digests": self._digests, "tensors": self._tensors, "elements": self._elements}

    def shutdown(self) -> None:
        pass


def _tensor(data: mmap.mmap, dtype: str, shape: list[int], offset: int) -> torch.Tensor:
    dtype = getattr(torch, dtype)
    count = math.prod(shape)
    raw = bytearray(data[offset : offset + count * dtype.itemsize])
    return torch.frombuffer(raw, dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def _unfinished_layers(model: torch.nn.Module, complete: bool) -> tuple[list[str], list[torch.nn.Module]]:
    """Layers that layerwise reload would finish with old or uninitialised numbers, as text; and layers tied to another that was loaded.

    vLLM processes a layer once all its elements have come; what is left at the end it either restores (nothing came) or
    processes as it is (some came), which is right only for the padded rows of a vocabulary. Buffers are not counted: vLLM
    computes them itself, no checkpoint holds them.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    layers = [(name, layer, get_layerwise_info(layer)) for name, layer in model.named_modules() if layer._parameters]
    kernel_ids = lambda layer, info: {id(p) for p in (info.kernel_tensors[0] if info.can_load() else layer._parameters).values() if p is not None}
    loaded_ids = {key for _, layer, info in layers if not info.can_load() or info.load_numel for key in kernel_ids(layer, info)}
    unfinished, tied = [], []
    for name, layer, info in layers:
        if not info.can_load():
            continue
        expected = sum(parameter.numel() for parameter in layer._parameters.values() if parameter is not None)
        if isinstance(layer, VocabParallelEmbedding):
            expected -= (layer.num_embeddings_per_partition - layer.shard_indices.num_org_elements) * layer.embedding_dim
        if info.load_numel == 0 and kernel_ids(layer, info) <= loaded_ids:
            tied.append(layer)
        elif info.load_numel < expected and (complete or info.load_numel):
            unfinished.append(f"{name} ({info.load_numel} of {expected} numbers)")
    return unfinished, tied
