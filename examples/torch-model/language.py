"""A torch model of one's own: it tells the language of a text by its letters.

`Network` is plain torch. `LanguageModel` is what legit_worker asks of a model: five methods, and no base class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from legit_worker.errors import InvalidInputError

LANGUAGES = ("english", "french", "german", "spanish")

#: The bytes of a text that are read. They tell enough.
MOST_BYTES = 500


class Network(nn.Module):
    """Looks for groups of five bytes that are typical of a language."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, 16, padding_idx=0)
        self.groups = nn.Conv1d(16, 64, kernel_size=5, padding=2)
        self.scores = nn.Linear(64, len(LANGUAGES))

    def forward(self, texts: Tensor) -> Tensor:
        """Scores, `[texts, languages]`, for `[texts, bytes]`. A 0 is padding, and changes no score."""
        found = self.groups(self.bytes(texts).transpose(1, 2)).relu()
        return self.scores((found * (texts != 0).unsqueeze(1)).amax(dim=2))


class LanguageModel:
    """What `LEGIT_WORKER_MODELS__LANGUAGE__KIND=language:LanguageModel` names. `path` is the setting `PATH`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self, device: str) -> None:
        """Once, when a task first needs the model. `device` is `cpu` or `cuda:0`."""
        self.device = device
        self.network = Network().to(device).eval()
        self.network.load_state_dict(torch.load(self.path, map_location=device, weights_only=True))

    def preprocess(self, item: object) -> Tensor:
        """One item, in its own task: an error here fails this task alone."""
        if not isinstance(item, str) or not item.strip():
            raise InvalidInputError(f"expected a text, got {item!r}")
        return torch.tensor(list(item.encode()[:MOST_BYTES]))

    def cost(self, prepared: Tensor) -> int:
        """What `forward` pays for: items of similar cost share a batch, which is padded to the longest."""
        return len(prepared)

    @torch.inference_mode()
    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        """A batch of items from many tasks. One row for each, in order."""
        return self.network(pad_sequence(list(batch), batch_first=True).to(self.device))

    def postprocess(self, output: Tensor) -> str:
        """One row: what the task gets."""
        return LANGUAGES[int(output.argmax())]
