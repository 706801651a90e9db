// This file lets spawnloop.go declare functions without bodies.
