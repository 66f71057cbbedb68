-- The account database. Applied at each start; every statement can be repeated.
-- Times of users are text, UTC with milliseconds: 2025-03-30T20:00:00.000Z.

CREATE TABLE IF NOT EXISTS users (
    id            TEXT NOT NULL PRIMARY KEY, -- opaque; a random UUID for users registered here
    name          TEXT NOT NULL,             -- as registered, trimmed, 1 to 100 characters
    email         TEXT NOT NULL UNIQUE,      -- trimmed and lower-cased, at most 254 bytes
    password_hash TEXT NOT NULL,             -- bcrypt, $2a$ or $2b$
    created_at    TEXT NOT NULL,             -- time of registration
    updated_at    TEXT NOT NULL              -- time of the last change that the user would notice
) STRICT;

-- Sessions, when there is no Redis. Each holds the user as of its creation, as the Redis hashes do.
CREATE TABLE IF NOT EXISTS sessions (
    id_hash    BLOB    NOT NULL PRIMARY KEY, -- SHA-256 of the session id: a stolen file opens no session
    user_id    TEXT    NOT NULL,             -- no foreign key: a registration makes its session first
    name       TEXT    NOT NULL,
    email      TEXT    NOT NULL,
    created_at TEXT    NOT NULL,             -- of the user, as above
    updated_at TEXT    NOT NULL,             -- of the user, as above
    expires_at INTEGER NOT NULL              -- end of the session, Unix milliseconds
) STRICT, WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS sessions_expires_at ON sessions (expires_at); -- for the sweep
