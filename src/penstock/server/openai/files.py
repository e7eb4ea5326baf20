"""/v1/files: upload, list, describe, download, delete."""

from __future__ import annotations

from typing import Any, Final

from penstock.base.errors import ValidationError
from penstock.messages.bounds import MAX_ENTRIES
from penstock.server.exchange import Exchange
from penstock.server.multipart import parse_form
from penstock.server.openai.batch_store import BatchStore, StoredFile
from penstock.server.openai.paging import limit_of, page, query_of
from penstock.server.state import ServerState

PURPOSES: Final = ("batch", "user_data")
MAX_LISTED: Final = 10_000


class Files:
    """Handlers. Each is a `call.Handler`. The store is opened when it is first needed."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._store: BatchStore | None = None
        state.when_closing.append(self.close)

    def close(self) -> None:
        """Ends the work on the store; the next use opens it again."""
        if self._store is not None:
            self._store.close()
            self._store = None

    @property
    def store(self) -> BatchStore:
        if self._store is None:
            self._store = BatchStore(self._state.settings.data_path, self._state.now_s())
        return self._store

    @property
    def exists(self) -> bool:
        """Whether an earlier run left a store."""
        return self._store is not None or (self._state.settings.data_path / "batches.sqlite3").exists()

    def add(self, filename: str, purpose: str, data: bytes) -> str:
        """Keeps a file; its id."""
        file_id = f"file-{self._state.new_id()}"
        self.store.add_file(StoredFile(file_id, self._state.now_s(), filename, purpose, len(data)), data)
        return file_id

    async def upload(self, body: bytes, exchange: Exchange) -> object:
        form = parse_form(body, exchange.headers.get(b"content-type", b""))
        unknown = next((name for name in form if name not in ("file", "purpose")), None)
        if unknown is not None:
            raise ValidationError(f"{unknown[:100]} is not a known field.", param=unknown[:100])
        if "file" not in form or "purpose" not in form:
            missing = "purpose" if "file" in form else "file"
            raise ValidationError(f"{missing} is required.", param=missing)
        purpose = form["purpose"].data.decode("utf-8", "replace")
        if purpose not in PURPOSES:
            raise ValidationError(f"purpose must be one of {', '.join(PURPOSES)}.", param="purpose")
        name = form["file"].filename[: MAX_ENTRIES["user_chars"]]
        return _describe(self.store.file(self.add(name, purpose, form["file"].data)))

    async def list_files(self, _body: bytes, exchange: Exchange) -> object:
        """Newest first."""
        query = query_of(exchange, ("after", "limit", "purpose"))
        limit, purpose = limit_of(query, MAX_LISTED, MAX_LISTED), query.get("purpose")
        files = [file for file in self.store.files() if purpose is None or file.purpose == purpose]
        ids = [file.file_id for file in files]
        start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
        data = [_describe(file) for file in files[start : start + limit]]
        return page(data, has_more=len(files) > start + limit)

    async def retrieve(self, _body: bytes, exchange: Exchange) -> object:
        return _describe(self.store.file(_id_of(exchange)))

    async def content(self, _body: bytes, exchange: Exchange) -> object:
        return self.store.content(_id_of(exchange))

    async def delete(self, _body: bytes, exchange: Exchange) -> object:
        file_id = _id_of(exchange)
        self.store.delete_file(file_id)
        return {"id": file_id, "object": "file", "deleted": True}


def _describe(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_s),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def _id_of(exchange: Exchange) -> str:
    file_id: str = exchange.scope["path_params"]["file_id"]
    return file_id
