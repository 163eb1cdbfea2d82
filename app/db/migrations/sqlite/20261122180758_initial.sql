-- create "users" table
CREATE TABLE `users` (`email` varchar NOT NULL, `name` varchar NOT NULL, `hashed_password` varchar NOT NULL, `is_admin` boolean NOT NULL DEFAULT 0, `created_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `updated_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `id` integer NOT NULL PRIMARY KEY AUTOINCREMENT);
-- create index "ix_users_email" to table: "users"
CREATE UNIQUE INDEX `ix_users_email` ON `users` (`email`);
-- create "api_keys" table
CREATE TABLE `api_keys` (`user_id` integer NOT NULL, `name` varchar NOT NULL, `prefix` varchar NOT NULL, `digest` varchar NOT NULL, `scopes` varchar NOT NULL, `created_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `expires_at` datetime NULL, `id` integer NOT NULL, PRIMARY KEY (`id`), CONSTRAINT `0` FOREIGN KEY (`user_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_api_keys_digest" to table: "api_keys"
CREATE UNIQUE INDEX `ix_api_keys_digest` ON `api_keys` (`digest`);
-- create index "ix_api_keys_user_id" to table: "api_keys"
CREATE INDEX `ix_api_keys_user_id` ON `api_keys` (`user_id`);
-- create "conversations" table
CREATE TABLE `conversations` (`owner_id` integer NOT NULL, `external_id` varchar NOT NULL, `created_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `id` varchar NOT NULL, PRIMARY KEY (`id`), CONSTRAINT `0` FOREIGN KEY (`owner_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_conversations_external" to table: "conversations"
CREATE UNIQUE INDEX `ix_conversations_external` ON `conversations` (`owner_id`, `external_id`);
-- create "runs" table
CREATE TABLE `runs` (`owner_id` integer NOT NULL, `conversation_id` varchar NULL, `parent_id` varchar NULL, `kind` varchar NOT NULL, `program` varchar NOT NULL, `scopes` varchar NOT NULL, `status` varchar NOT NULL, `options` text NOT NULL, `worker` varchar NULL, `token` integer NOT NULL DEFAULT '0', `lease_until` double NULL, `crashes` integer NOT NULL DEFAULT '0', `cancelling` boolean NOT NULL DEFAULT 0, `output` text NULL, `error` text NULL, `usage` text NULL, `finish_reason` varchar NULL, `transcript` varchar NULL, `idempotency_key` varchar NULL, `fingerprint` varchar NULL, `created_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `finished_at` datetime NULL, `deleted_at` datetime NULL, `id` varchar NOT NULL, PRIMARY KEY (`id`), CONSTRAINT `0` FOREIGN KEY (`parent_id`) REFERENCES `runs` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT `1` FOREIGN KEY (`conversation_id`) REFERENCES `conversations` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE, CONSTRAINT `2` FOREIGN KEY (`owner_id`) REFERENCES `users` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- create index "ix_runs_conversation" to table: "runs"
CREATE INDEX `ix_runs_conversation` ON `runs` (`conversation_id`, `created_at`);
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
-- create "events" table
CREATE TABLE `events` (`body` text NOT NULL, `created_at` datetime NOT NULL DEFAULT CURRENT_TIMESTAMP, `run_id` varchar NOT NULL, `seq` integer NOT NULL, PRIMARY KEY (`run_id`, `seq`), CONSTRAINT `0` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- create "messages" table
CREATE TABLE `messages` (`body` text NOT NULL, `run_id` varchar NOT NULL, `seq` integer NOT NULL, PRIMARY KEY (`run_id`, `seq`), CONSTRAINT `0` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
-- create "tool_calls" table
CREATE TABLE `tool_calls` (`tool` varchar NOT NULL, `key` varchar NOT NULL, `status` varchar NOT NULL, `decided` boolean NOT NULL DEFAULT 0, `result` text NULL, `run_id` varchar NOT NULL, `step` integer NOT NULL, `call_id` text NOT NULL, PRIMARY KEY (`run_id`, `step`, `call_id`), CONSTRAINT `0` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON UPDATE NO ACTION ON DELETE CASCADE);
