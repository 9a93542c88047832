"""Records in memory, wherever they lie: rows of a tensor, and a selection of them that spans several tensors."""

from dataclasses import dataclass

import numpy as np
import torch

from hillinfer import native
from hillinfer.attention import to_device


@dataclass(slots=True)
class Records:
    """Some rows of a tensor of records.

    data  (m, 2, Hkv, D)
    rows  int64 (k,), or None for all rows in order
    """

    data: torch.Tensor
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.data) if self.rows is None else len(self.rows)

    def __getitem__(self, index: np.ndarray) -> "Records":
        return Records(self.data, index if self.rows is None else self.rows[index])

    def tensor(self) -> torch.Tensor:
        """(k, 2, Hkv, D) on the device of `data`; a copy unless all rows are taken."""
        if self.rows is None:
            return self.data
        return self.data.index_select(0, to_device(torch.from_numpy(self.rows), self.data.device))

    def addresses(self) -> np.ndarray:
        """Of each record in host memory, int64 (k,)."""
        width = self.data.stride(0) * self.data.element_size()
        return (np.arange(len(self.data)) if self.rows is None else self.rows) * width + self.data.data_ptr()


class Selection:
    """Records of a selection of tokens, in the one or more tensors that hold them; kept alive by it.

    parts  (places among the selected tokens, their records); together the places are 0 .. k-1
    """

    def __init__(self, parts: list[tuple[np.ndarray, Records]]):
        self.parts = [(places, records) for places, records in parts if len(places)]

    def __len__(self) -> int:
        return sum(len(places) for places, _ in self.parts)

    def addresses(self) -> np.ndarray:
        """Of each record in host memory, int64 (k,)."""
        out = np.empty(len(self), np.int64)
        for places, records in self.parts:
            out[places] = records.addresses()
        return out

    def tensor(self) -> torch.Tensor:
        """The records, (k, 2, Hkv, D); a copy where they lie apart."""
        (_, first), every = self.parts[0], np.arange(len(self))
        if len(self.parts) == 1 and first.rows is not None and (np.diff(first.rows) == 1).all():
            return first.data[first.rows[0] :][: len(self)]
        out = first.data.new_empty((len(self), *first.data.shape[1:]))
        self.copy_to(every, out, every)
        return out

    def copy_to(self, index: np.ndarray, out: torch.Tensor, slots: np.ndarray) -> None:
        """out[slots] = records[index], in host memory; slots are distinct."""
        if native.available():
            native.copy(self.addresses()[index], out, slots, torch.get_num_threads())
            return
        joined = torch.cat([records.tensor() for _, records in self.parts])
        order = np.argsort(np.concatenate([places for places, _ in self.parts]))
        out[torch.from_numpy(slots)] = joined[torch.from_numpy(order[index])]
