"""One job per output: `OutputLock`, which a job that was killed does not leave behind."""

from __future__ import annotations

import os
import socket
import stat
import warnings
from pathlib import Path
from types import TracebackType


class OutputLock:
    """The right to write an output, which one job has at a time.

    It is a lock of the system on a hidden file beside the output, so that it ends with the process, however that ends.
    The file may be left behind; the next job takes it over.

    Args:
        output: what is to be written.
    """

    def __init__(self, output: Path) -> None:
        self._output, self._path = output, output.with_name(f".{output.name}.lit_cka-lock")
        self._descriptor: int | None = None

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            try:
                self._path.unlink(missing_ok=True)  # as long as it is locked: who waits for it sees that it is gone
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def take(self) -> None:
        """Take the lock, until the end of the `with` block; where the system has none, a warning says so.

        Raises:
            FileExistsError: if another job has it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows
            self._warn("this system has no such locks")
            return
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise FileExistsError(f"Expected no {str(self._path)!r}, the file of a lock, but there is one.")
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_there(descriptor):
                    self._descriptor = descriptor
            except BlockingIOError as error:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "of another job"
                raise FileExistsError(
                    f"Expected `output` to be written by one job at a time, but process {holder} is writing "
                    f"{str(self._output)!r}. Wait until it has ended, or name another output."
                ) from error
            except OSError as error:
                if isinstance(error, FileExistsError):
                    raise
                self._warn(f"the file system has no locks ({error.strerror})")
                return
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())

    def _is_there(self, descriptor: int) -> bool:
        """Returns whether the file is the one of that name still: the job that had it before may have removed it."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _warn(self, reason: str) -> None:
        warnings.warn(
            f"Nothing keeps a second job from writing {str(self._output)!r} at the same time: {reason}.", stacklevel=8
        )
