-- create "users" table
CREATE TABLE "users" ("id" serial NOT NULL, "email" character varying(255) NOT NULL, "name" character varying(100) NOT NULL, "hashed_password" character varying(255) NOT NULL, "is_admin" boolean NOT NULL DEFAULT false, "created_at" timestamptz NOT NULL DEFAULT now(), "updated_at" timestamptz NOT NULL DEFAULT now(), PRIMARY KEY ("id"));
-- create index "ix_users_email" to table: "users"
CREATE UNIQUE INDEX "ix_users_email" ON "users" ("email");
-- create "api_keys" table
CREATE TABLE "api_keys" ("id" serial NOT NULL, "user_id" integer NOT NULL, "name" character varying(100) NOT NULL, "prefix" character varying(16) NOT NULL, "digest" character varying(64) NOT NULL, "scopes" character varying(1000) NOT NULL, "created_at" timestamptz NOT NULL DEFAULT now(), "expires_at" timestamptz NULL, PRIMARY KEY ("id"), CONSTRAINT "api_keys_user_id_fkey" FOREIGN KEY ("user_id") REFERENCES "users" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_api_keys_digest" to table: "api_keys"
CREATE UNIQUE INDEX "ix_api_keys_digest" ON "api_keys" ("digest");
-- create index "ix_api_keys_user_id" to table: "api_keys"
CREATE INDEX "ix_api_keys_user_id" ON "api_keys" ("user_id");
-- create "conversations" table
CREATE TABLE "conversations" ("id" character varying(32) NOT NULL, "owner_id" integer NOT NULL, "external_id" character varying(255) NOT NULL, "created_at" timestamptz NOT NULL DEFAULT now(), PRIMARY KEY ("id"), CONSTRAINT "conversations_owner_id_fkey" FOREIGN KEY ("owner_id") REFERENCES "users" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_conversations_external" to table: "conversations"
CREATE UNIQUE INDEX "ix_conversations_external" ON "conversations" ("owner_id", "external_id");
-- create "runs" table
CREATE TABLE "runs" ("id" character varying(32) NOT NULL, "owner_id" integer NOT NULL, "conversation_id" character varying(32) NULL, "parent_id" character varying(32) NULL, "kind" character varying(16) NOT NULL, "program" character varying(100) NOT NULL, "scopes" character varying(1000) NOT NULL, "status" character varying(16) NOT NULL, "options" text NOT NULL, "worker" character varying(100) NULL, "token" integer NOT NULL DEFAULT 0, "lease_until" double precision NULL, "crashes" integer NOT NULL DEFAULT 0, "cancelling" boolean NOT NULL DEFAULT false, "output" text NULL, "error" text NULL, "usage" text NULL, "finish_reason" character varying(32) NULL, "transcript" character varying(64) NULL, "idempotency_key" character varying(64) NULL, "fingerprint" character varying(64) NULL, "created_at" timestamptz NOT NULL DEFAULT now(), "finished_at" timestamptz NULL, "deleted_at" timestamptz NULL, PRIMARY KEY ("id"), CONSTRAINT "runs_conversation_id_fkey" FOREIGN KEY ("conversation_id") REFERENCES "conversations" ("id") ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT "runs_owner_id_fkey" FOREIGN KEY ("owner_id") REFERENCES "users" ("id") ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT "runs_parent_id_fkey" FOREIGN KEY ("parent_id") REFERENCES "runs" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_runs_conversation" to table: "runs"
CREATE INDEX "ix_runs_conversation" ON "runs" ("conversation_id", "created_at");
-- create index "ix_runs_idempotency" to table: "runs"
CREATE UNIQUE INDEX "ix_runs_idempotency" ON "runs" ("owner_id", "idempotency_key");
-- create index "ix_runs_open" to table: "runs"
CREATE INDEX "ix_runs_open" ON "runs" ("status", "created_at");
-- create index "ix_runs_owner" to table: "runs"
CREATE INDEX "ix_runs_owner" ON "runs" ("owner_id", "created_at");
-- create index "ix_runs_parent" to table: "runs"
CREATE INDEX "ix_runs_parent" ON "runs" ("parent_id");
-- create index "ix_runs_transcript" to table: "runs"
CREATE INDEX "ix_runs_transcript" ON "runs" ("owner_id", "transcript");
-- create "events" table
CREATE TABLE "events" ("run_id" character varying(32) NOT NULL, "seq" integer NOT NULL, "body" text NOT NULL, "created_at" timestamptz NOT NULL DEFAULT now(), PRIMARY KEY ("run_id", "seq"), CONSTRAINT "events_run_id_fkey" FOREIGN KEY ("run_id") REFERENCES "runs" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create "messages" table
CREATE TABLE "messages" ("run_id" character varying(32) NOT NULL, "seq" integer NOT NULL, "body" text NOT NULL, PRIMARY KEY ("run_id", "seq"), CONSTRAINT "messages_run_id_fkey" FOREIGN KEY ("run_id") REFERENCES "runs" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create "tool_calls" table
CREATE TABLE "tool_calls" ("run_id" character varying(32) NOT NULL, "step" integer NOT NULL, "call_id" text NOT NULL, "tool" character varying(100) NOT NULL, "key" character varying(64) NOT NULL, "status" character varying(16) NOT NULL, "decided" boolean NOT NULL DEFAULT false, "result" text NULL, PRIMARY KEY ("run_id", "step", "call_id"), CONSTRAINT "tool_calls_run_id_fkey" FOREIGN KEY ("run_id") REFERENCES "runs" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
