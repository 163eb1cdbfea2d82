-- modify "conversations" table
ALTER TABLE "conversations" ADD COLUMN "labels" text NULL;
-- drop index "ix_runs_conversation" from table: "runs"
DROP INDEX "public"."ix_runs_conversation";
-- modify "runs" table
ALTER TABLE "runs" ADD COLUMN "position" integer NULL, ADD COLUMN "turn_id" character varying(32) NULL, ADD COLUMN "message_id" character varying(255) NULL;
-- each run was a turn of its own, and stood where it was accepted
UPDATE "runs" SET "turn_id" = "id";
UPDATE "runs" SET "position" = "placed"."position" FROM (SELECT "id", row_number() OVER (PARTITION BY "conversation_id" ORDER BY "created_at", "id") AS "position" FROM "runs" WHERE "conversation_id" IS NOT NULL AND "deleted_at" IS NULL) AS "placed" WHERE "placed"."id" = "runs"."id";
ALTER TABLE "runs" ALTER COLUMN "turn_id" SET NOT NULL;
-- what waits for a person cannot be decided any more: there was no key to decide by
UPDATE "runs" SET "cancelling" = true WHERE "status" = 'waiting';
-- create index "ix_runs_conversation" to table: "runs"
CREATE UNIQUE INDEX "ix_runs_conversation" ON "runs" ("conversation_id", "position");
-- create index "ix_tool_calls_key" to table: "tool_calls"
CREATE INDEX "ix_tool_calls_key" ON "tool_calls" ("key");
-- create "files" table
CREATE TABLE "files" ("id" character varying(32) NOT NULL, "owner_id" integer NOT NULL, "name" character varying(255) NOT NULL, "purpose" character varying(16) NOT NULL, "media_type" character varying(100) NOT NULL, "size" integer NOT NULL, "sha256" character varying(64) NOT NULL, "data" bytea NOT NULL, "created_at" timestamptz NOT NULL, "expires_at" timestamptz NULL, PRIMARY KEY ("id"), CONSTRAINT "files_owner_id_fkey" FOREIGN KEY ("owner_id") REFERENCES "users" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_files_owner" to table: "files"
CREATE INDEX "ix_files_owner" ON "files" ("owner_id", "created_at", "id");
