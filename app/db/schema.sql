-- The schema as the models say, for PostgreSQL. Generated: `just db-upgrade NAME` writes it.

CREATE TABLE users (
	id SERIAL NOT NULL,
	email VARCHAR(255) NOT NULL,
	name VARCHAR(100) NOT NULL,
	hashed_password VARCHAR(255) NOT NULL,
	is_admin BOOLEAN DEFAULT false NOT NULL,
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
	updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
	PRIMARY KEY (id)
);

CREATE UNIQUE INDEX ix_users_email ON users (email);

CREATE TABLE allowances (
	owner_id INTEGER NOT NULL,
	day VARCHAR(10) NOT NULL,
	tokens BIGINT DEFAULT 0 NOT NULL,
	cost DOUBLE PRECISION DEFAULT 0 NOT NULL,
	held_tokens BIGINT DEFAULT 0 NOT NULL,
	held_cost DOUBLE PRECISION DEFAULT 0 NOT NULL,
	minute INTEGER DEFAULT '0' NOT NULL,
	accepted INTEGER DEFAULT '0' NOT NULL,
	PRIMARY KEY (owner_id),
	FOREIGN KEY(owner_id) REFERENCES users (id) ON DELETE CASCADE
);

CREATE TABLE api_keys (
	id SERIAL NOT NULL,
	user_id INTEGER NOT NULL,
	name VARCHAR(100) NOT NULL,
	prefix VARCHAR(16) NOT NULL,
	digest VARCHAR(64) NOT NULL,
	scopes VARCHAR(1000) NOT NULL,
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
	expires_at TIMESTAMP WITH TIME ZONE,
	PRIMARY KEY (id),
	FOREIGN KEY(user_id) REFERENCES users (id) ON DELETE CASCADE
);

CREATE UNIQUE INDEX ix_api_keys_digest ON api_keys (digest);

CREATE INDEX ix_api_keys_user_id ON api_keys (user_id);

CREATE TABLE conversations (
	id VARCHAR(32) NOT NULL,
	owner_id INTEGER NOT NULL,
	external_id VARCHAR(255) NOT NULL,
	labels TEXT,
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
	PRIMARY KEY (id),
	FOREIGN KEY(owner_id) REFERENCES users (id) ON DELETE CASCADE
);

CREATE UNIQUE INDEX ix_conversations_external ON conversations (owner_id, external_id);

CREATE TABLE files (
	id VARCHAR(32) NOT NULL,
	owner_id INTEGER NOT NULL,
	name VARCHAR(255) NOT NULL,
	purpose VARCHAR(16) NOT NULL,
	media_type VARCHAR(100) NOT NULL,
	size INTEGER NOT NULL,
	sha256 VARCHAR(64) NOT NULL,
	data BYTEA NOT NULL,
	created_at TIMESTAMP WITH TIME ZONE NOT NULL,
	expires_at TIMESTAMP WITH TIME ZONE,
	PRIMARY KEY (id),
	FOREIGN KEY(owner_id) REFERENCES users (id) ON DELETE CASCADE
);

CREATE INDEX ix_files_owner ON files (owner_id, created_at, id);

CREATE TABLE schedules (
	id VARCHAR(32) NOT NULL,
	owner_id INTEGER NOT NULL,
	scopes VARCHAR(1000) NOT NULL,
	program VARCHAR(100) NOT NULL,
	request TEXT NOT NULL,
	cron VARCHAR(100),
	timezone VARCHAR(64) NOT NULL,
	next_at DOUBLE PRECISION,
	paused BOOLEAN DEFAULT false NOT NULL,
	last_run_id VARCHAR(32),
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
	PRIMARY KEY (id),
	FOREIGN KEY(owner_id) REFERENCES users (id) ON DELETE CASCADE
);

CREATE INDEX ix_schedules_next ON schedules (next_at);

CREATE INDEX ix_schedules_owner ON schedules (owner_id, created_at);

CREATE TABLE schema_versions (
	owner_id INTEGER NOT NULL,
	name VARCHAR(64) NOT NULL,
	version INTEGER NOT NULL,
	sha256 VARCHAR(64) NOT NULL,
	compat VARCHAR(16),
	body TEXT NOT NULL,
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
	PRIMARY KEY (owner_id, name, version),
	FOREIGN KEY(owner_id) REFERENCES users (id) ON DELETE CASCADE
);

CREATE TABLE usage (
	owner_id INTEGER NOT NULL,
	day VARCHAR(10) NOT NULL,
	program VARCHAR(100) NOT NULL,
	model VARCHAR(200) NOT NULL,
	requests BIGINT DEFAULT 0 NOT NULL,
	input_tokens BIGINT DEFAULT 0 NOT NULL,
	cached_tokens BIGINT DEFAULT 0 NOT NULL,
	output_tokens BIGINT DEFAULT 0 NOT NULL,
	cost DOUBLE PRECISION DEFAULT 0 NOT NULL,
	PRIMARY KEY (owner_id, day, program, model),
	FOREIGN KEY(owner_id) REFERENCES users (id) ON DELETE CASCADE
);

CREATE TABLE runs (
	id VARCHAR(32) NOT NULL,
	owner_id INTEGER NOT NULL,
	conversation_id VARCHAR(32),
	batch_id VARCHAR(32),
	position INTEGER,
	parent_id VARCHAR(32),
	turn_id VARCHAR(32) NOT NULL,
	message_id VARCHAR(255),
	kind VARCHAR(16) NOT NULL,
	program VARCHAR(100) NOT NULL,
	scopes VARCHAR(1000) NOT NULL,
	status VARCHAR(16) NOT NULL,
	options TEXT NOT NULL,
	worker VARCHAR(100),
	token INTEGER DEFAULT '0' NOT NULL,
	lease_until DOUBLE PRECISION,
	crashes INTEGER DEFAULT '0' NOT NULL,
	cancelling BOOLEAN DEFAULT false NOT NULL,
	held_tokens BIGINT DEFAULT 0 NOT NULL,
	held_cost DOUBLE PRECISION DEFAULT 0 NOT NULL,
	output TEXT,
	error TEXT,
	usage TEXT,
	finish_reason VARCHAR(32),
	cache_key VARCHAR(64),
	transcript VARCHAR(64),
	idempotency_key VARCHAR(64),
	fingerprint VARCHAR(64),
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
	finished_at TIMESTAMP WITH TIME ZONE,
	deleted_at TIMESTAMP WITH TIME ZONE,
	PRIMARY KEY (id),
	FOREIGN KEY(owner_id) REFERENCES users (id) ON DELETE CASCADE,
	FOREIGN KEY(conversation_id) REFERENCES conversations (id) ON DELETE CASCADE,
	FOREIGN KEY(batch_id) REFERENCES runs (id) ON DELETE CASCADE,
	FOREIGN KEY(parent_id) REFERENCES runs (id) ON DELETE CASCADE
);

CREATE UNIQUE INDEX ix_runs_batch ON runs (batch_id, position);

CREATE INDEX ix_runs_batch_status ON runs (batch_id, status, position);

CREATE INDEX ix_runs_cache ON runs (owner_id, cache_key);

CREATE UNIQUE INDEX ix_runs_conversation ON runs (conversation_id, position);

CREATE INDEX ix_runs_finished ON runs (finished_at);

CREATE INDEX ix_runs_goes_on ON runs (owner_id, status, created_at) WHERE batch_id IS NULL AND (status = 'queued' OR status = 'running');

CREATE UNIQUE INDEX ix_runs_idempotency ON runs (owner_id, idempotency_key);

CREATE INDEX ix_runs_open ON runs (status, created_at);

CREATE INDEX ix_runs_owner ON runs (owner_id, created_at);

CREATE INDEX ix_runs_parent ON runs (parent_id);

CREATE INDEX ix_runs_transcript ON runs (owner_id, transcript);

CREATE TABLE events (
	run_id VARCHAR(32) NOT NULL,
	seq INTEGER NOT NULL,
	body TEXT NOT NULL,
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
	PRIMARY KEY (run_id, seq),
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);

CREATE TABLE messages (
	run_id VARCHAR(32) NOT NULL,
	seq INTEGER NOT NULL,
	body TEXT NOT NULL,
	PRIMARY KEY (run_id, seq),
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);

CREATE TABLE tool_calls (
	run_id VARCHAR(32) NOT NULL,
	step INTEGER NOT NULL,
	call_id TEXT NOT NULL,
	tool VARCHAR(100) NOT NULL,
	key VARCHAR(64) NOT NULL,
	status VARCHAR(16) NOT NULL,
	decided BOOLEAN DEFAULT false NOT NULL,
	result TEXT,
	PRIMARY KEY (run_id, step, call_id),
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);

CREATE INDEX ix_tool_calls_key ON tool_calls (key);

CREATE INDEX ix_tool_calls_unknown ON tool_calls (run_id) WHERE status = 'unknown';
