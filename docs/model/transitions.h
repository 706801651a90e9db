/* The transitions that a search has seen. pan prints them at its end. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *seen[64][3];
static int seenLen;

static int compareSeen(const void *a, const void *b) {
	const char *const *x = a, *const *y = b;
	for (int i = 0; i < 3; i++) {
		int c = strcmp(x[i], y[i]);
		if (c != 0)
			return c;
	}
	return 0;
}

static void printSeen(void) {
	qsort(seen, seenLen, sizeof seen[0], compareSeen);
	for (int i = 0; i < seenLen; i++)
		printf("transition %s %s %s\n", seen[i][0], seen[i][1], seen[i][2]);
}

static void saw(const char *machine, const char *from, const char *to) {
	for (int i = 0; i < seenLen; i++)
		if (!strcmp(seen[i][0], machine) && !strcmp(seen[i][1], from) && !strcmp(seen[i][2], to))
			return;
	if (seenLen == 0)
		atexit(printSeen);
	seen[seenLen][0] = machine, seen[seenLen][1] = from, seen[seenLen][2] = to;
	seenLen++;
}
