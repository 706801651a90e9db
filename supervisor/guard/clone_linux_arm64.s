#include "textflag.h"

// func cloneJob(trap, arg1, arg2, arg3 uintptr, a *spawnArea, run uintptr) (pid, errno uintptr)
//
// The child begins on a stack of its own, which has nothing of ours. So it calls run, a function
// with the argument a, as compiled code calls it: a is in R0. A call by name would go through a
// wrapper, which the race detector instruments.
TEXT ·cloneJob(SB),NOSPLIT,$0-64
	MOVD	trap+0(FP), R8
	MOVD	arg1+8(FP), R0
	MOVD	arg2+16(FP), R1
	MOVD	arg3+24(FP), R2
	MOVD	a+32(FP), R19
	MOVD	run+40(FP), R20
	MOVD	ZR, R3
	MOVD	ZR, R4
	MOVD	ZR, R5
	SVC
	CBZ	R0, child
	MOVD	ZR, R1
	CMN	$4095, R0
	BCC	made
	NEG	R0, R1
made:
	MOVD	R0, pid+48(FP)
	MOVD	R1, errno+56(FP)
	RET
child:
	SUB	$64, RSP // a compiled function may store its arguments in its caller's frame
	MOVD	R19, R0
	CALL	(R20)
	BRK // it does not return
