-- The account database. Applied at each start; idempotent. Nothing here is newer than SQLite 3.31: people read
-- the file with the sqlite3 of their distribution.

-- The table and the index of the original program, to the letter, so that either program can use the other's
-- file. The declared type DATETIME matters to Prisma: with another one it reads dates back as null.
-- createdAt and updateAt are Unix milliseconds (INTEGER). Rows of the original may hold text.
-- password is a bcrypt hash: $2a$, $2b$ or $2y$.
CREATE TABLE IF NOT EXISTS "users" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "name" TEXT NOT NULL,
    "email" TEXT NOT NULL,
    "password" TEXT NOT NULL,
    "createdAt" DATETIME NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updateAt" DATETIME NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS "users_email_key" ON "users"("email");

-- Finds an email in any case of its ASCII letters. Not unique: the original has accounts that differ by case.
CREATE INDEX IF NOT EXISTS "users_email_nocase" ON "users"("email" COLLATE NOCASE);

-- Sessions, when there is no Redis. Each holds the user as of the sign-in, as the Redis hashes do.
CREATE TABLE IF NOT EXISTS sessions (
    id_hash    BLOB    NOT NULL PRIMARY KEY, -- SHA-256 of the session id: a stolen file opens no session
    user_id    TEXT    NOT NULL,             -- no foreign key: a registration makes its session first
    name       TEXT    NOT NULL,
    email      TEXT    NOT NULL,
    created_at TEXT    NOT NULL,             -- of the user, UTC with milliseconds: 2025-03-30T20:00:00.000Z
    updated_at TEXT    NOT NULL,             -- of the user, in the same form
    expires_at INTEGER NOT NULL              -- end of the session, Unix milliseconds
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS sessions_expires_at ON sessions (expires_at); -- for the sweep
