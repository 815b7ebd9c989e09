"""The device's half: give back the parameters as they came."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, _: Context) -> Message:
    """Return what was received, as a client does that has trained for no time at all."""
    arrays = ArrayRecord(message.content["arrays"].to_numpy_ndarrays())
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
