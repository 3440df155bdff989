"""How much memory the kernels move, counted from their own loads and stores under Triton's interpreter."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from amvl_fast.bench.compile_cases import Case


@dataclasses.dataclass
class Traffic:
    """What the programs of one or more launches load and store; masked lanes move nothing and do not count.

    Attributes:
        elements, bytes: moved in blocks of rank 2 and more: tensors with an element per latent element.
        row_elements: moved as vectors, a number per row: KLs and their upstream gradients.
        scalars: single numbers that a whole program moves: seeds, which the first-level cache keeps, and the numbers
            of its row where it has but one.
        latents: latent elements, set by whoever launched.
    """

    elements: int = 0
    bytes: int = 0
    row_elements: int = 0
    scalars: int = 0
    latents: int = 0

    @property
    def elements_per_latent(self) -> float:
        return self.elements / self.latents

    @property
    def bytes_per_latent(self) -> float:
        """Without the terms per row, which are below 1% of it at any width that matters."""
        return self.bytes / self.latents


@contextmanager
def counting() -> Iterator[Traffic]:
    """Count what kernels move in the block; in a process that runs Triton's interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        lanes, shape = int(mask.data.sum()), pointers.data.shape
        if len(shape) >= 2:
            traffic.elements += lanes
            traffic.bytes += lanes * (pointers.get_element_ty().primitive_bitwidth // 8)
        elif shape in ((), (1,)):  # the interpreter gives a scalar either
            traffic.scalars += lanes
        else:
            traffic.row_elements += lanes

    # Loads and stores without a mask pass through these two as well.
    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield traffic


def traffic_of(cases: Sequence[Case]) -> list[Traffic]:
    """The traffic of each case, counted in a process of its own, for this one may not run the interpreter."""
    asked = json.dumps([dataclasses.asdict(case) for case in cases])
    command = [sys.executable, "-m", "amvl_fast.bench.traffic"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"counting memory traffic failed:\n{done.stderr}")
    return [Traffic(**counted) for counted in json.loads(done.stdout)]


def main() -> None:
    """Read cases from stdin and write their traffic to stdout, both JSON."""
    from amvl_fast.bench.compile_cases import Case

    counted = []
    for fields in json.load(sys.stdin):
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        case = Case(**tuples)
        with counting() as traffic:
            _, traffic.latents = case.launch("cpu")
        counted.append(dataclasses.asdict(traffic))
    json.dump(counted, sys.stdout)


if __name__ == "__main__":
    main()
