-- modify "runs" table
ALTER TABLE "runs" ADD COLUMN "batch_id" character varying(32) NULL, ADD COLUMN "cache_key" character varying(64) NULL, ADD CONSTRAINT "runs_batch_id_fkey" FOREIGN KEY ("batch_id") REFERENCES "runs" ("id") ON UPDATE NO ACTION ON DELETE CASCADE;
-- create index "ix_runs_batch" to table: "runs"
CREATE UNIQUE INDEX "ix_runs_batch" ON "runs" ("batch_id", "position");
-- create index "ix_runs_batch_status" to table: "runs"
CREATE INDEX "ix_runs_batch_status" ON "runs" ("batch_id", "status", "position");
-- create index "ix_runs_cache" to table: "runs"
CREATE INDEX "ix_runs_cache" ON "runs" ("owner_id", "cache_key");
-- create "schema_versions" table
CREATE TABLE "schema_versions" ("owner_id" integer NOT NULL, "name" character varying(64) NOT NULL, "version" integer NOT NULL, "sha256" character varying(64) NOT NULL, "compat" character varying(16) NULL, "body" text NOT NULL, "created_at" timestamptz NOT NULL DEFAULT now(), PRIMARY KEY ("owner_id", "name", "version"), CONSTRAINT "schema_versions_owner_id_fkey" FOREIGN KEY ("owner_id") REFERENCES "users" ("id") ON UPDATE NO ACTION ON DELETE CASCADE);
