"""What one run holds of its owner's allowance, and what it has spent but not written down yet."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from pydantic_ai.messages import AgentStreamEvent

from app.core.json import whole
from app.core.tasks import unbroken
from app.models import Run
from app.services.allowances import NOTHING, Amount, Limits, Move, Spent, lost
from app.services.changes import HOLD, Rows
from app.services.journal import Journal
from app.services.run_log import RunLog


class Purse:
    """Holds what a model request may take before it is made; settles what it took with what the
    run writes next.

    ready: something is held for the next request already.
    """

    def __init__(
        self, run: Run, log: RunLog, journal: Journal, limits: Limits, *, ready: bool = True
    ) -> None:
        self._run = run
        self._log = log
        self._journal = journal
        self._limits = limits
        self._held = Amount(run.held_tokens, run.held_cost)
        self._asking = NOTHING  # for requests that are being answered
        self._spent: dict[tuple[str, str], Spent] = {}
        self._turn = asyncio.Lock()
        self.ready = ready and self._held != NOTHING
        if not ready and self._held != NOTHING:
            self._spent = lost(run.program, self._held)

    def spend(self, model: str, spent: Spent) -> None:
        """Notes what a request took, to be written down with what the run writes next."""
        self.ready = False
        model = whole(model).replace("\0", "")[:200]  # a provider may call it anything
        self._spent.setdefault((self._run.program, model), Spent()).add(spent)

    async def hold(self, amount: Amount = NOTHING, rows: Rows = ()) -> None:
        """Commits the rows; settles what was spent, and holds so much for the next request.

        Raises LimitReached: then nothing of it was done.
        """
        # Who is stopped meanwhile must still know what is held.
        await unbroken(self._commit(amount, rows, self._limits))

    async def settle(self, rows: Rows = (), last: AgentStreamEvent | None = None) -> None:
        """Commits the rows, which end or pause the run, with the `last` event that says so:
        nothing is held for it any more."""
        await self._commit(NOTHING, rows, None, last)

    async def _commit(
        self,
        amount: Amount,
        rows: Rows,
        limits: Limits | None,
        last: AgentStreamEvent | None = None,
    ) -> None:
        async with self._turn:
            hold = self._asking + amount if limits else NOTHING
            spent, self._spent = self._spent, {}
            if limits:
                held = {"hold_tokens": hold.tokens, "hold_cost": hold.cost}
                rows = [*rows, (HOLD, {"of_run": self._run.id, **held})]
            move = None
            if limits or spent or self._held != NOTHING:
                more = hold - self._held
                move = Move(owner_id=self._run.owner_id, held=more, spent=spent, limits=limits)
            try:
                await self._journal.commit(rows, self._log, move, last)
            except BaseException:
                for (_, model), each in spent.items():
                    self.spend(model, each)
                raise
            self._held, self.ready = hold, amount != NOTHING

    @asynccontextmanager
    async def request(self, amount: Callable[[], Amount]) -> AsyncGenerator[None]:
        """Around one request of several that may go on at once: so much is held for it.

        Raises LimitReached.
        """
        asked, free = self._held, self.ready
        self.ready = False
        if not free:
            asked = amount()
        self._asking += asked
        try:
            taken = sum((each.amount for each in self._spent.values()), self._asking)
            if not free and taken.exceeds(self._held):
                await self.hold()
            yield
        finally:
            self._asking -= asked
