"""Training on a dataset with PyTorch: loader, collators, losses, decoding on a device (extra `torch`).

```python
from logitstore.torch import HFCollator, LogitLoader, StreamingLogits, losses

stream = StreamingLogits("distributions", batch_size=8)
for batch in LogitLoader(stream, collate_fn=HFCollator(), num_workers=2):
    loss = losses.distillation_loss(student(batch["input_ids"]).logits, batch)
```
"""

try:
    import torch as _torch  # noqa: F401 - the first thing to be missing
except ImportError as error:
    from logitstore.errors import MissingDependencyError

    raise MissingDependencyError("logitstore.torch needs PyTorch: pip install 'logitstore[torch]'") from error

from logitstore.torch import losses
from logitstore.torch.collate import AxolotlCollator, DistillKitCollator, HFCollator, MegatronCollator, TRLCollator
from logitstore.torch.device import EncodedBatch, decode_batch, to_device
from logitstore.torch.loader import LogitDataset, LogitLoader, StreamingLogits
from logitstore.torch.order import Order
from logitstore.torch.pack import Packed
from logitstore.torch.source import Mixture, Shuffled
from logitstore.torch.state import State, global_state
from logitstore.torch.teachers import Teachers

__all__ = [
    "AxolotlCollator",
    "DistillKitCollator",
    "EncodedBatch",
    "HFCollator",
    "LogitDataset",
    "LogitLoader",
    "MegatronCollator",
    "Mixture",
    "Order",
    "Packed",
    "Shuffled",
    "State",
    "StreamingLogits",
    "TRLCollator",
    "Teachers",
    "decode_batch",
    "global_state",
    "losses",
    "to_device",
]
