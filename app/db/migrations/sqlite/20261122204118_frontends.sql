-- disable the enforcement of foreign-keys constraints
PRAGMA foreign_keys = off;
-- add column "labels" to table: "conversations"
ALTER TABLE `conversations` ADD COLUMN `labels` text NULL;
-- create "new_runs" table
CREATE TABLE `new_runs` (`owner_id` integer NOT NULL, `conversation_id` varchar NULL, `position` integer NULL, `parent_id` varchar NULL, `turn_id` varchar NOT NULL, `message_id` varchar NULL, `kind` varchar NOT NULL, `program` varchar NOT NULL, `scopes` varchar NOT NULL, `status` varchar NOT NULL, `options` text NOT NULL, `worker` varchar NULL, `token` integer NOT NULL DEFAULT '0', `lease_until` double NULL, `crashes` integer NOT NULL DEFAULT '0', `cancelling` boolean NOT NULL DEFAULT 0, `output` text NULL, `error` text NULL, `usage` text NULL, `finish_reason` varchar NULL, `transcript` varchar NULL, `idempotency_key` varchar NULL, `fingerprint` varchar NULL, `created_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `finished_at` datetime NULL, `deleted_at` datetime NULL, `id` varchar NOT NULL, PRIMARY KEY (`id`), CONSTRAINT `0` FOREIGN KEY (`parent_id`) REFERENCES `runs` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT `1` FOREIGN KEY (`conversation_id`) REFERENCES `conversations` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT `2` FOREIGN KEY (`owner_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- copy rows from old table "runs" to new temporary table "new_runs"
INSERT INTO `new_runs` (`owner_id`, `conversation_id`, `position`, `parent_id`, `turn_id`, `kind`, `program`, `scopes`, `status`, `options`, `worker`, `token`, `lease_until`, `crashes`, `cancelling`, `output`, `error`, `usage`, `finish_reason`, `transcript`, `idempotency_key`, `fingerprint`, `created_at`, `finished_at`, `deleted_at`, `id`) SELECT `owner_id`, `conversation_id`, CASE WHEN `conversation_id` IS NOT NULL AND `deleted_at` IS NULL THEN row_number() OVER (PARTITION BY `conversation_id`, `deleted_at` IS NULL ORDER BY `created_at`, `id`) END, `parent_id`, `id`, `kind`, `program`, `scopes`, `status`, `options`, `worker`, `token`, `lease_until`, `crashes`, `cancelling`, `output`, `error`, `usage`, `finish_reason`, `transcript`, `idempotency_key`, `fingerprint`, `created_at`, `finished_at`, `deleted_at`, `id` FROM `runs`;
-- what waits for a person cannot be decided any more: there was no key to decide by
UPDATE `new_runs` SET `cancelling` = 1 WHERE `status` = 'waiting';
-- drop "runs" table after copying rows
DROP TABLE `runs`;
-- rename temporary table "new_runs" to "runs"
ALTER TABLE `new_runs` RENAME TO `runs`;
-- create index "ix_runs_conversation" to table: "runs"
CREATE UNIQUE INDEX `ix_runs_conversation` ON `runs` (`conversation_id`, `position`);
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
-- create index "ix_tool_calls_key" to table: "tool_calls"
CREATE INDEX `ix_tool_calls_key` ON `tool_calls` (`key`);
-- create "files" table
CREATE TABLE `files` (`owner_id` integer NOT NULL, `name` varchar NOT NULL, `purpose` varchar NOT NULL, `media_type` varchar NOT NULL, `size` integer NOT NULL, `sha256` varchar NOT NULL, `data` blob NOT NULL, `created_at` datetime NOT NULL, `expires_at` datetime NULL, `id` varchar NOT NULL, PRIMARY KEY (`id`), CONSTRAINT `0` FOREIGN KEY (`owner_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_files_owner" to table: "files"
CREATE INDEX `ix_files_owner` ON `files` (`owner_id`, `created_at`, `id`);
-- enable back the enforcement of foreign-keys constraints
PRAGMA foreign_keys = on;
