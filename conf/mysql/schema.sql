-- The tables of proxyd's telemetry store, for MariaDB 10.11 and MySQL 8: mysql DATABASE < this file.
-- `proxyd schema --apply` creates what is missing of them. What each is for: docs/accounting.md.

CREATE TABLE sys_ai_transactions (
  transaction_id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  user_id BIGINT UNSIGNED NOT NULL,
  model_id SMALLINT UNSIGNED NOT NULL,
  prompt_tokens INT UNSIGNED NOT NULL,
  completion_tokens INT UNSIGNED NOT NULL,
  created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
  tenant VARCHAR(64) NOT NULL,
  request_id VARCHAR(64) CHARACTER SET ascii NOT NULL,
  status VARCHAR(16) NOT NULL,
  estimated TINYINT NOT NULL,
  cached_tokens INT UNSIGNED NOT NULL,
  reasoning_tokens INT UNSIGNED NOT NULL,
  upstream VARCHAR(64) NOT NULL,
  attempts TINYINT NOT NULL,
  ttft_ms INT UNSIGNED NOT NULL,
  duration_ms INT UNSIGNED NOT NULL,
  PRIMARY KEY (transaction_id),
  KEY idx_sys_ai_user_window (user_id, created_at, prompt_tokens, completion_tokens),
  KEY idx_sys_ai_created (created_at)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_unicode_ci;

CREATE TABLE sys_ai_spool_offsets (
  node CHAR(16) CHARACTER SET ascii NOT NULL,
  stream VARCHAR(64) CHARACTER SET ascii NOT NULL,
  segment BIGINT UNSIGNED NOT NULL,
  position BIGINT UNSIGNED NOT NULL,
  finished TINYINT NOT NULL,
  PRIMARY KEY (node, stream)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_unicode_ci;

CREATE TABLE sys_ai_spool_open (
  node CHAR(16) CHARACTER SET ascii NOT NULL,
  stream VARCHAR(64) CHARACTER SET ascii NOT NULL,
  txn BIGINT UNSIGNED NOT NULL,
  intent BLOB NOT NULL,
  checkpoint BLOB NOT NULL,
  PRIMARY KEY (node, stream, txn)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_unicode_ci;
