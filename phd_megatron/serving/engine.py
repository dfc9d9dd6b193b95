"""The thread that owns the model: rows wait, are computed together in one forward pass, and leave when they end.

At each step the rows of clients that hung up go, waiting ones come in as far as there is room, and every row gets one
token. So a short answer never waits for a long one beside it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from phd_megatron.huggingface.loading import first_words
from phd_megatron.serving.decoder import Decoder
from phd_megatron.serving.limits import Limits
from phd_megatron.serving.refusals import Refusal, stopping
from phd_megatron.serving.row import Row
from phd_megatron.serving.sampling import Told, told
from phd_megatron.serving.watch import Watch

logger = logging.getLogger(__name__)
#: tokens of prompts that one step reads, at least one prompt: running rows wait for them
_PREFILL = 4096


class Engine:
    """Starts its thread at once; :meth:`stop` ends it."""

    def __init__(self, decoder: Decoder, limits: Limits, watch: Watch | None = None) -> None:
        self._decoder, self.limits, self._watch = decoder, limits, watch or Watch()
        self._most = limits.max_batch_size if decoder.joins else 1
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._entering = 0  # rows whose prompt is being read
        self._changed = threading.Condition()
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows in the batch."""
        return len(self._running)

    @property
    def is_well(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._draining

    def submit(self, rows: Sequence[Row]) -> None:
        """Let all these rows wait for their turn, or none.

        Raises:
            Refusal: the queue is full (429), or the server is stopping (503).
        """
        with self._changed:
            if self._draining:
                raise stopping()
            running = len(self._running) + self._entering
            if len(rows) > self._most + self.limits.max_queue - running - len(self._waiting):
                raise Refusal(
                    f"{len(rows)} more to compute, where {running} are running and {len(self._waiting)} waiting of at "
                    f"most {self._most} and {self.limits.max_queue}: the queue is full; try again later",
                    status=429,
                    code="queue_full",
                    retry_after=1,
                )
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: Iterable[Row]) -> None:
        """Nobody waits for these any more: they leave at the next step. Rows that have ended stay as they are."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._changed.notify()

    def drain(self) -> None:
        """Take no more rows; those that are there go on."""
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """End the thread after the step that it is in; rows that are left are told that the server stops."""
        with self._changed:
            self._draining = self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._wait():
            self._drop_cancelled()
            try:
                self._admit()
                if self._running:
                    self._step()
            except Exception as error:  # of the model or the device: its rows are lost, the server is not
                logger.warning("rows are lost: %s", first_words(error))
                self._fail_all(error)
        self._fail_all(stopping(), also_waiting=True)

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._waiting or self._stopped)
            return not self._stopped

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [row for row in self._waiting if row.cancelled]
            for row in gone:
                self._waiting.remove(row)
        for _ in [*gone, *(row for row in self._running if row.cancelled)]:
            self._watch.ended("cancelled")
        self._keep([row for row in self._running if not row.cancelled])

    def _keep(self, rows: list[Row]) -> None:
        staying = set(map(id, rows))
        self._decoder.keep([number for number, row in enumerate(self._running) if id(row) in staying])
        self._running = rows

    def _admit(self) -> None:
        """Read prompts of waiting rows, as many as there is room for and one step may take."""
        read = 0
        while read < _PREFILL and (rows := self._next()):
            try:
                self._prefill(rows)
            except Exception as error:  # the others go on
                logger.warning("a prompt of %d tokens is lost: %s", len(rows[0].prompt), first_words(error))
                self._entering = 0
                self._fail(rows, error)
            read += len(rows[0].prompt)

    def _next(self) -> list[Row]:
        """The rows that wait longest, of one prompt, as many as there is room for."""
        with self._changed:
            rows: list[Row] = []
            while self._waiting and len(self._running) + len(rows) < self._most:
                if rows and self._waiting[0].prompt is not rows[0].prompt:
                    break
                rows.append(self._waiting.popleft())
            self._entering = len(rows)
            return rows

    def _prefill(self, rows: list[Row]) -> None:
        prompt, every, before = rows[0].prompt, rows[0].tell_prompt, self._decoder.rows
        logits = self._decoder.prefill(prompt, len(rows), every)
        try:
            if not bool(logits.isfinite().all()):
                raise _not_finite()
            self._watch.read(len(prompt))
            if every and (alternatives := rows[0].choice.alternatives) is not None:
                wanted = torch.tensor(prompt[1:], device=logits.device, dtype=torch.long)
                for row in rows:
                    row.read_prompt(told(logits[:-1], wanted, alternatives))
            picked = self._picked(rows, logits[-1:].expand(len(rows), -1)) if rows[0].wants_tokens else []
        except Exception:  # whatever it is, the new rows' slots leave the cache; who called tells their clients
            self._decoder.keep(range(before))
            raise
        with self._changed:
            self._running, self._entering = [*self._running, *rows], 0
        now = time.perf_counter()
        for row in rows if picked else ():
            self._watch.first(now - row.arrived)
        if not picked:
            for row in rows:
                row.finish("length")
            self._leave(rows)
        self._take(rows, picked)

    def _step(self) -> None:
        began, rows = time.perf_counter(), self._running
        logits = self._decoder.step([row.last for row in rows])
        finite = logits.isfinite().all(-1).tolist()
        if not all(finite):
            bad = [row for row, fine in zip(rows, finite, strict=True) if not fine]
            self._keep([row for row, fine in zip(rows, finite, strict=True) if fine])
            self._fail(bad, _not_finite())
            rows, logits = self._running, logits[torch.tensor(finite, device=logits.device)]
        if rows:
            picked = self._picked(rows, logits)
            self._watch.stepped(len(rows), time.perf_counter() - began)
            self._take(rows, picked)

    def _picked(self, rows: list[Row], logits: Tensor) -> list[tuple[int, Told | None]]:
        """Each row's next token by its logits ``[rows, vocabulary]``, and what is told of it."""
        likeliest = logits.argmax(-1)
        chosen = torch.stack(
            [
                likeliest[number] if row.sampler.is_plain else row.sampler.pick(logits[number])
                for number, row in enumerate(rows)
            ]
        )
        words: list[Told | None] = [None] * len(rows)
        for number, row in enumerate(rows):
            if (alternatives := row.choice.alternatives) is not None:
                here = slice(number, number + 1)
                words[number] = told(logits[here], chosen[here], alternatives)[0]
        return list(zip(chosen.tolist(), words, strict=True))

    def _take(self, rows: list[Row], picked: list[tuple[int, Told | None]]) -> None:
        """Give running rows their tokens; those that end leave."""
        pairs = list(zip(rows, picked, strict=True)) if picked else []
        self._leave([row for row, (token, what) in pairs if row.take(token, what)])

    def _leave(self, rows: list[Row]) -> None:
        if rows:
            left = set(map(id, rows))
            self._keep([row for row in self._running if id(row) not in left])
        for row in rows:
            self._watch.ended("done")
            row.close()

    def _fail(self, rows: Iterable[Row], error: Exception) -> None:
        for row in rows:
            row.fail(_as_refusal(error))
            self._watch.ended("failed")

    def _fail_all(self, error: Exception, also_waiting: bool = False) -> None:
        with self._changed:
            waiting = list(self._waiting) if also_waiting else []
            self._waiting = deque() if also_waiting else self._waiting
        rows = [*self._running, *waiting]
        self._keep([])
        self._fail(rows, error)


def _not_finite() -> Refusal:
    return Refusal(
        "the model's logits are not finite, so it has diverged or its parameters are damaged; the server needs another "
        "checkpoint",
        status=500,
    )


def _as_refusal(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    return Refusal(f"the model failed: {first_words(error)}; send a shorter request, or tell its operator", status=500)
