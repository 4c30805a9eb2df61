"What asks a run to pause, for the tests of stopped and resumed runs."

from finpatch.trainer import Callback


class PauseIn(Callback):
    "Ask for a pause when an event comes for the n-th time."

    order = 1

    def __init__(self, event, n):
        self.n = n
        setattr(self, event, self.count)

    def count(self, trainer):
        self.n -= 1
        if self.n == 0:
            trainer.request_pause("asked")
