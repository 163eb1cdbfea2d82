"""The tables. Importing this package registers them all with `Base.metadata`."""

from app.models.allowance import Allowance
from app.models.api_key import ApiKey
from app.models.conversation import Conversation
from app.models.event import Event
from app.models.file import File
from app.models.message import Message
from app.models.run import Run
from app.models.schedule import Schedule
from app.models.schema import SchemaVersion
from app.models.tool_call import ToolCall
from app.models.usage import Usage
from app.models.user import User

__all__ = [
    "Allowance",
    "ApiKey",
    "Conversation",
    "Event",
    "File",
    "Message",
    "Run",
    "Schedule",
    "SchemaVersion",
    "ToolCall",
    "Usage",
    "User",
]
