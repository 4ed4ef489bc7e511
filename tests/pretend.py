"A device that is not there: what is computed on it has shapes and a place, and no numbers."

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only


class Pretended(FakeTensorMode):
    "In here a tensor that was left on the CPU is an error, and so is code that waits for a number."

    device = "meta"

    def __enter__(self):
        self.allow_meta = True
        return super().__enter__()

    def _put_one(self, tensor):
        return self.from_tensor(tensor).to(self.device).detach()

    def put(self, tensors):
        "The same tensors in tuples, on the device."
        return tree_map_only(torch.Tensor, self._put_one, tensors)

    def put_model(self, model):
        "A model, moved to the device."
        for module in model.modules():
            for name, w in module._parameters.items():
                if w is not None:
                    module._parameters[name] = torch.nn.Parameter(self._put_one(w))
            for name, w in module._buffers.items():
                module._buffers[name] = self._put_one(w)
        return model
