-- What 0.1.0 sent to an empty database, SQLite and PostgreSQL alike (serving/store.py there: metadata.create_all).
CREATE TABLE api_keys (
	id VARCHAR(40) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	scopes VARCHAR(200) NOT NULL, 
	rate_per_minute INTEGER NOT NULL, 
	created FLOAT NOT NULL, 
	revoked FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (digest)
);
CREATE TABLE consensus_requests (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	idempotency_key VARCHAR(255), 
	fingerprint VARCHAR(64) NOT NULL, 
	body TEXT NOT NULL, 
	state VARCHAR(12) NOT NULL, 
	answer TEXT, 
	runner VARCHAR(40) NOT NULL, 
	lease FLOAT NOT NULL, 
	created FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (owner, idempotency_key)
);
CREATE INDEX ix_consensus_requests_created ON consensus_requests (created);
CREATE TABLE consensus_events (
	request VARCHAR(40) NOT NULL, 
	number INTEGER NOT NULL, 
	type VARCHAR(20) NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (request, number), 
	FOREIGN KEY(request) REFERENCES consensus_requests (id) ON DELETE CASCADE
);
