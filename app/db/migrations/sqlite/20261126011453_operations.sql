-- disable the enforcement of foreign-keys constraints
PRAGMA foreign_keys = off;
-- create index "ix_tool_calls_unknown" to table: "tool_calls"
CREATE INDEX `ix_tool_calls_unknown` ON `tool_calls` (`run_id`) WHERE status = 'unknown';
-- create "new_runs" table
CREATE TABLE `new_runs` (`owner_id` integer NOT NULL, `conversation_id` varchar NULL, `batch_id` varchar NULL, `position` integer NULL, `parent_id` varchar NULL, `turn_id` varchar NOT NULL, `message_id` varchar NULL, `kind` varchar NOT NULL, `program` varchar NOT NULL, `scopes` varchar NOT NULL, `status` varchar NOT NULL, `options` text NOT NULL, `worker` varchar NULL, `token` integer NOT NULL DEFAULT '0', `lease_until` double NULL, `crashes` integer NOT NULL DEFAULT '0', `cancelling` boolean NOT NULL DEFAULT 0, `held_tokens` bigint NOT NULL DEFAULT 0, `held_cost` double NOT NULL DEFAULT 0, `output` text NULL, `error` text NULL, `usage` text NULL, `finish_reason` varchar NULL, `cache_key` varchar NULL, `transcript` varchar NULL, `idempotency_key` varchar NULL, `fingerprint` varchar NULL, `created_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `finished_at` datetime NULL, `deleted_at` datetime NULL, `id` varchar NOT NULL, PRIMARY KEY (`id`), CONSTRAINT `0` FOREIGN KEY (`parent_id`) REFERENCES `runs` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT `1` FOREIGN KEY (`batch_id`) REFERENCES `runs` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT `2` FOREIGN KEY (`conversation_id`) REFERENCES `conversations` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT `3` FOREIGN KEY (`owner_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- copy rows from old table "runs" to new temporary table "new_runs"
INSERT INTO `new_runs` (`owner_id`, `conversation_id`, `batch_id`, `position`, `parent_id`, `turn_id`, `message_id`, `kind`, `program`, `scopes`, `status`, `options`, `worker`, `token`, `lease_until`, `crashes`, `cancelling`, `output`, `error`, `usage`, `finish_reason`, `cache_key`, `transcript`, `idempotency_key`, `fingerprint`, `created_at`, `finished_at`, `deleted_at`, `id`) SELECT `owner_id`, `conversation_id`, `batch_id`, `position`, `parent_id`, `turn_id`, `message_id`, `kind`, `program`, `scopes`, `status`, `options`, `worker`, `token`, `lease_until`, `crashes`, `cancelling`, `output`, `error`, `usage`, `finish_reason`, `cache_key`, `transcript`, `idempotency_key`, `fingerprint`, `created_at`, `finished_at`, `deleted_at`, `id` FROM `runs`;
-- drop "runs" table after copying rows
DROP TABLE `runs`;
-- rename temporary table "new_runs" to "runs"
ALTER TABLE `new_runs` RENAME TO `runs`;
-- create index "ix_runs_batch" to table: "runs"
CREATE UNIQUE INDEX `ix_runs_batch` ON `runs` (`batch_id`, `position`);
-- create index "ix_runs_batch_status" to table: "runs"
CREATE INDEX `ix_runs_batch_status` ON `runs` (`batch_id`, `status`, `position`);
-- create index "ix_runs_cache" to table: "runs"
CREATE INDEX `ix_runs_cache` ON `runs` (`owner_id`, `cache_key`);
-- create index "ix_runs_conversation" to table: "runs"
CREATE UNIQUE INDEX `ix_runs_conversation` ON `runs` (`conversation_id`, `position`);
-- create index "ix_runs_finished" to table: "runs"
CREATE INDEX `ix_runs_finished` ON `runs` (`finished_at`);
-- create index "ix_runs_goes_on" to table: "runs"
CREATE INDEX `ix_runs_goes_on` ON `runs` (`owner_id`, `status`, `created_at`) WHERE batch_id IS NULL AND (status = 'queued' OR status = 'running');
-- create index "ix_runs_idempotency" to table: "runs"
CREATE UNIQUE INDEX `ix_runs_idempotency` ON `runs` (`owner_id`, `idempotency_key`);
-- create index "ix_runs_open" to table: "runs"
CREATE INDEX `ix_runs_open` ON `runs` (`status`, `created_at`);
-- create index "ix_runs_owner" to table: "runs"
CREATE INDEX `ix_runs_owner` ON `runs` (`owner_id`, `created_at`);
-- create index "ix_runs_parent" to table: "runs"
CREATE INDEX `ix_runs_parent` ON `runs` (`parent_id`);
-- create index "ix_runs_transcript" to table: "runs"
CREATE INDEX `ix_runs_transcript` ON `runs` (`owner_id`, `transcript`);
-- create "allowances" table
CREATE TABLE `allowances` (`day` varchar NOT NULL, `tokens` bigint NOT NULL DEFAULT 0, `cost` double NOT NULL DEFAULT 0, `held_tokens` bigint NOT NULL DEFAULT 0, `held_cost` double NOT NULL DEFAULT 0, `minute` integer NOT NULL DEFAULT '0', `accepted` integer NOT NULL DEFAULT '0', `owner_id` integer NOT NULL, PRIMARY KEY (`owner_id`), CONSTRAINT `0` FOREIGN KEY (`owner_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- create "schedules" table
CREATE TABLE `schedules` (`owner_id` integer NOT NULL, `scopes` varchar NOT NULL, `program` varchar NOT NULL, `request` text NOT NULL, `cron` varchar NULL, `timezone` varchar NOT NULL, `next_at` double NULL, `paused` boolean NOT NULL DEFAULT 0, `last_run_id` varchar NULL, `created_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `id` varchar NOT NULL, PRIMARY KEY (`id`), CONSTRAINT `0` FOREIGN KEY (`owner_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_schedules_next" to table: "schedules"
CREATE INDEX `ix_schedules_next` ON `schedules` (`next_at`);
-- create index "ix_schedules_owner" to table: "schedules"
CREATE INDEX `ix_schedules_owner` ON `schedules` (`owner_id`, `created_at`);
-- create "usage" table
CREATE TABLE `usage` (`requests` bigint NOT NULL DEFAULT 0, `input_tokens` bigint NOT NULL DEFAULT 0, `cached_tokens` bigint NOT NULL DEFAULT 0, `output_tokens` bigint NOT NULL DEFAULT 0, `cost` double NOT NULL DEFAULT 0, `owner_id` integer NOT NULL, `day` varchar NOT NULL, `program` varchar NOT NULL, `model` varchar NOT NULL, PRIMARY KEY (`owner_id`, `day`, `program`, `model`), CONSTRAINT `0` FOREIGN KEY (`owner_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- enable back the enforcement of foreign-keys constraints
PRAGMA foreign_keys = on;
