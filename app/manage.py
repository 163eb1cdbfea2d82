"""Accounts and API keys from the command line: `python -m app.manage --help`."""

import argparse
import asyncio
import getpass
import sys
from collections.abc import Sequence

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from app.core.errors import AppError
from app.core.security import ADMIN, EVERYTHING, PRIVILEGED, Caller
from app.db.migrate import migrate
from app.db.session import async_session, engine
from app.schemas.auth import ApiKeyCreate
from app.schemas.user import UserCreate
from app.services.user import UserNotFound, UserService
from tools import all_tools, declared


async def create_user(args: argparse.Namespace, users: UserService) -> None:
    name = args.name or args.email.partition("@")[0]
    data = UserCreate(email=args.email, name=name, password=args.password)
    user = await users.create(data, is_admin=args.admin)
    print(f"Created {'administrator' if user.is_admin else 'user'} {user.id}: {user.email}")


async def create_key(args: argparse.Namespace, users: UserService) -> None:
    user = await users.get_by_email(args.email)
    if user is None:
        raise UserNotFound
    caller = Caller.of(user.id, (EVERYTHING, ADMIN) if user.is_admin else (EVERYTHING,))
    data = ApiKeyCreate(name=args.name, scopes=args.scopes, expires_in_days=args.days)
    known = {EVERYTHING, *PRIVILEGED} | {
        declared(each.tool_def).needs for each in all_tools().values()
    }
    for scope in sorted(set(data.scopes) - known):
        print(f"No tool needs the scope {scope!r} so far.", file=sys.stderr)
    _, secret = await users.create_key(caller, data)
    print(secret)


def read_password(from_stdin: bool) -> str:
    if not from_stdin and sys.stdin.isatty():
        return getpass.getpass()
    return sys.stdin.readline().rstrip("\r\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app.manage", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    user = commands.add_parser("create-user", help="make an account")
    user.set_defaults(command=create_user)
    user.add_argument("email")
    user.add_argument("--name", help="default: what stands before the @")
    user.add_argument("--admin", action="store_true", help="make it an administrator")
    user.add_argument(
        "--password-stdin",
        action="store_true",
        help="read the password from standard input, also from a terminal",
    )

    key = commands.add_parser("create-key", help="make an API key and print it, this once")
    key.set_defaults(command=create_key)
    key.add_argument("email")
    key.add_argument("--name", default="command line")
    key.add_argument("--scopes", nargs="+", default=[EVERYTHING], metavar="SCOPE")
    key.add_argument("--days", type=int, metavar="N", help="default: does not expire")
    return parser.parse_args(argv)


async def run(args: argparse.Namespace) -> None:
    try:
        await migrate(engine)
        async with async_session() as session:
            await args.command(args, UserService(session))
    finally:
        await engine.dispose()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.command is create_user:
            args.password = read_password(args.password_stdin)
        asyncio.run(run(args))
    except AppError as error:
        return _fail(error.message)
    except ValidationError as error:
        return _fail("; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors()))
    except UnicodeDecodeError:
        return _fail("The password is not valid UTF-8.")
    except (SQLAlchemyError, OSError) as error:
        return _fail(f"Database error: {getattr(error, 'orig', None) or error}")
    return 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
