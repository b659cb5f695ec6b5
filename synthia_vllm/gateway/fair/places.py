"""Who loses a place in a queue that is full: the user who holds most of it."""

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

from synthia_vllm.gateway.fair.tickets import Ticket, User


def displaced(own: User, users: Iterable[User], *, requests: int, tokens: int) -> list[Ticket] | None:
    """The requests that leave so that `own`'s newest may stay, where the queue is over by so many requests and tokens.

    They are of users who hold more than he does of what is short, by weight: of the one with most first, the newest
    first. None: these have not enough, so it is his own that has to go.
    """
    everybody = list(users)
    gone: list[Ticket] = []
    if requests > 0 and not _collect(gone, requests, own, everybody, _places, lambda ticket: 1):
        return None
    tokens -= sum(ticket.tokens for ticket in gone)
    if tokens > 0 and not _collect(gone, tokens, own, everybody, _tokens, lambda ticket: ticket.tokens):
        return None
    return gone


def _collect(
    gone: list[Ticket],
    over: int,
    own: User,
    users: list[User],
    held: Callable[[User], int],
    size: Callable[[Ticket], int],
) -> bool:
    """Adds to `gone` until it comes to `over`; False if it can't."""
    most = held(own) / own.weight
    heap = [(-held(user) / user.weight, number) for number, user in enumerate(users) if held(user) / user.weight > most]
    heapify(heap)
    left = {number: [ticket for ticket in users[number].waiting if ticket not in gone] for _, number in heap}
    while over > 0 and heap:
        share, number = heappop(heap)
        if not left[number]:
            continue
        ticket = left[number].pop()
        gone.append(ticket)
        over -= size(ticket)
        heappush(heap, (share + size(ticket) / users[number].weight, number))
    return over <= 0


def _places(user: User) -> int:
    return len(user.waiting)


def _tokens(user: User) -> int:
    return user.prompt + user.most
