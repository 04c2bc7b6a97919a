"""The one connection per (frontend, worker): asyncio shells around `penstock.wire`."""
