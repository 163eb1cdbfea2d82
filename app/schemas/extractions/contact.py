from pydantic import BaseModel, Field


class Contact(BaseModel):
    """Read one person's contact details; leave out what the text does not say."""

    name: str = Field(min_length=1, description="Full name, without titles.")
    email: str | None = Field(None, pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$")
    phone: str | None = Field(None, description="As written, with the country code if given.")
    company: str | None = None
