-- The rights of proxyd's user in MariaDB 10.11 and MySQL 8, and no more: mariadb proxyd < this file.
-- `proxyd` is the database that is named here or on the command line; the tables must be there (schema.sql), and the user:
--
--   over the socket of the same machine, without a password, for the system's user proxyd
--     MariaDB   CREATE USER proxyd@localhost IDENTIFIED VIA unix_socket;
--     MySQL     CREATE USER proxyd@localhost IDENTIFIED WITH auth_socket;    (once: INSTALL PLUGIN auth_socket SONAME 'auth_socket.so';)
--
--   over TCP, with a password (openssl rand -base64 24), for the addresses of the nodes; then write it for proxyd@localhost
--   below, too
--     CREATE USER proxyd@'10.1.2.%' IDENTIFIED BY '...';
--
-- CREATE, ALTER, INDEX and DROP are not among them: the daemon never changes a table. `proxyd schema --apply` needs CREATE.

-- Rows are added, summed, and deleted when telemetry.retention is over; none is ever changed.
GRANT SELECT, INSERT, DELETE ON sys_ai_transactions TO proxyd@localhost;
-- How far each node's spool is stored, and what was begun and has not ended.
GRANT SELECT, INSERT, UPDATE, DELETE ON sys_ai_spool_offsets TO proxyd@localhost;
GRANT SELECT, INSERT, UPDATE, DELETE ON sys_ai_spool_open TO proxyd@localhost;

-- Who reads bills, and nothing else: GRANT SELECT ON sys_ai_transactions TO somebody@localhost;
