"""A model, measured on data that this device holds out: it never trains, and reports means."""

from broker_bridge.wire.messages import Report
from device_client.duties.duty import Duty
from device_client.duties.standing import State
from device_client.events import Effect, Eligible, Evaluate, Evaluated, Event, Failed, Send

__all__ = ["Measuring"]


class Measuring(Duty):
    """IDLE ─ begin ─► FETCHING ─ model here ─► EVALUATING ─ measured ─► IDLE"""

    def begin(self) -> list[Effect]:
        """Fetch the model."""
        return self._begin_fetching()

    def step(self, event: Event) -> list[Effect]:
        """Take one event, change, and say what to do."""
        match event:
            case Eligible(against) if against:
                return self.give_up(against)
            case Failed(number, reason):
                return self._failed(number, reason)
            case Evaluated() if self.state is State.EVALUATING:
                return self._evaluated(event)
        return self._fetch_on(event) if self.state is State.FETCHING else []

    def _act(self) -> list[Effect]:
        self.state = State.EVALUATING
        return [*self._here.keep(self.announcement), Evaluate(self.announcement.model_version)]

    def _evaluated(self, event: Evaluated) -> list[Effect]:
        if event.model_version != self.announcement.model_version:
            return []
        self.state = State.IDLE
        self._here.report = Report(
            round=self.announcement.round,
            model_version=event.model_version,
            examples=event.examples,
            metrics=event.metrics,
        )
        remembered = self._here.remember(evaluated_version=event.model_version)
        return [Send(self._here.report), *remembered]
