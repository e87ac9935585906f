-- The rights of proxyd's user in MariaDB 10.11 and MySQL 8, and no more: mariadb DATABASE < this file.
-- The tables must be there (schema.sql), and the user:
--
--   over the socket of the same machine, without a password, for the system's user proxyd
--     MariaDB   CREATE USER proxyd@localhost IDENTIFIED VIA unix_socket;
--     MySQL     INSTALL PLUGIN auth_socket SONAME 'auth_socket.so';   -- once
--               CREATE USER proxyd@localhost IDENTIFIED WITH auth_socket;
--
--   over TCP, with a password (openssl rand -base64 24), from the addresses of the nodes; then proxyd@'10.1.2.%' stands in
--   place of proxyd@localhost below
--     CREATE USER proxyd@'10.1.2.%' IDENTIFIED BY '...';
--
-- The daemon never changes a table, so CREATE, ALTER, INDEX and DROP are not among them. `proxyd schema --apply` needs the
-- first three: run it as another user, or run schema.sql instead.

-- Rows are added, summed, and deleted when telemetry.retention is over; none is ever changed.
GRANT SELECT, INSERT, DELETE ON sys_ai_transactions TO proxyd@localhost;
-- How far each node's spool is stored, and what was begun and has not ended.
GRANT SELECT, INSERT, UPDATE, DELETE ON sys_ai_spool_offsets TO proxyd@localhost;
GRANT SELECT, INSERT, UPDATE, DELETE ON sys_ai_spool_open TO proxyd@localhost;

-- Who reads bills, and nothing else: GRANT SELECT ON sys_ai_transactions TO somebody@localhost;
