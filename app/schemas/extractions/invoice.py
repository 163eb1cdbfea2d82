from datetime import date
from decimal import Decimal

from pydantic import BaseModel, Field


class InvoiceLine(BaseModel):
    """One position of the invoice."""

    description: str
    quantity: Decimal = Decimal(1)
    amount: Decimal = Field(description="Price of the whole line, in `currency`.")


class Invoice(BaseModel):
    """Read one supplier invoice; copy amounts as printed."""

    supplier: str
    number: str | None = Field(None, description="The invoice number.")
    issued: date | None = Field(None, description="Date of the invoice, ISO 8601.")
    lines: list[InvoiceLine] = []
    total: Decimal = Field(description="Grand total with tax, in `currency`.")
    currency: str = Field(pattern="^[A-Z]{3}$", description="ISO 4217, e.g. EUR.")
