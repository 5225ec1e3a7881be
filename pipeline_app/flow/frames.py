"""What an exception keeps alive: the frames that it came through, with all that is in them."""

from __future__ import annotations


def let_go(exc: BaseException) -> None:
    """Cut an exception that was dealt with off its frames, and those that led to it off theirs.

    A frame in which an exception is kept leads to the exception, and that back to the frame and to its callers. Such
    circles stay, with the inputs of a whole message, until the collector of garbage finds them: few and large objects
    do not make it look.
    """
    seen: set[int] = set()
    todo = [exc]
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        # Not by assignment, which a frozen dataclass refuses.
        BaseException.with_traceback(current, None)
        todo.extend(other for other in (current.__cause__, current.__context__) if other is not None)
        if isinstance(current, BaseExceptionGroup):
            todo.extend(current.exceptions)
