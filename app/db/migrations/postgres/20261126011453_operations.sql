-- modify "runs" table
ALTER TABLE "runs" ADD COLUMN "held_tokens" bigint NOT NULL DEFAULT 0, ADD COLUMN "held_cost" double precision NOT NULL DEFAULT 0;
-- create index "ix_runs_finished" to table: "runs"
CREATE INDEX "ix_runs_finished" ON "runs" ("finished_at");
-- create index "ix_runs_goes_on" to table: "runs"
CREATE INDEX "ix_runs_goes_on" ON "runs" ("owner_id", "status", "created_at") WHERE ((batch_id IS NULL) AND (((status)::text = 'queued'::text) OR ((status)::text = 'running'::text)));
-- create index "ix_tool_calls_unknown" to table: "tool_calls"
CREATE INDEX "ix_tool_calls_unknown" ON "tool_calls" ("run_id") WHERE ((status)::text = 'unknown'::text);
-- create "usage" table
CREATE TABLE "usage" ("owner_id" integer NOT NULL, "day" character varying(10) NOT NULL, "program" character varying(100) NOT NULL, "model" character varying(200) NOT NULL, "requests" bigint NOT NULL DEFAULT 0, "input_tokens" bigint NOT NULL DEFAULT 0, "cached_tokens" bigint NOT NULL DEFAULT 0, "output_tokens" bigint NOT NULL DEFAULT 0, "cost" double precision NOT NULL DEFAULT 0, PRIMARY KEY ("owner_id", "day", "program", "model"), CONSTRAINT "usage_owner_id_fkey" FOREIGN KEY ("owner_id") REFERENCES "users" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create "allowances" table
CREATE TABLE "allowances" ("owner_id" integer NOT NULL, "day" character varying(10) NOT NULL, "tokens" bigint NOT NULL DEFAULT 0, "cost" double precision NOT NULL DEFAULT 0, "held_tokens" bigint NOT NULL DEFAULT 0, "held_cost" double precision NOT NULL DEFAULT 0, "minute" integer NOT NULL DEFAULT 0, "accepted" integer NOT NULL DEFAULT 0, PRIMARY KEY ("owner_id"), CONSTRAINT "allowances_owner_id_fkey" FOREIGN KEY ("owner_id") REFERENCES "users" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create "schedules" table
CREATE TABLE "schedules" ("id" character varying(32) NOT NULL, "owner_id" integer NOT NULL, "scopes" character varying(1000) NOT NULL, "program" character varying(100) NOT NULL, "request" text NOT NULL, "cron" character varying(100) NULL, "timezone" character varying(64) NOT NULL, "next_at" double precision NULL, "paused" boolean NOT NULL DEFAULT false, "last_run_id" character varying(32) NULL, "created_at" timestamptz NOT NULL DEFAULT now(), PRIMARY KEY ("id"), CONSTRAINT "schedules_owner_id_fkey" FOREIGN KEY ("owner_id") REFERENCES "users" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_schedules_next" to table: "schedules"
CREATE INDEX "ix_schedules_next" ON "schedules" ("next_at");
-- create index "ix_schedules_owner" to table: "schedules"
CREATE INDEX "ix_schedules_owner" ON "schedules" ("owner_id", "created_at");
