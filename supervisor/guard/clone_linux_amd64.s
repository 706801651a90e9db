#include "textflag.h"

// func cloneJob(trap, arg1, arg2, arg3 uintptr, a *spawnArea, run uintptr) (pid, errno uintptr)
//
// The child begins on a stack of its own, which has nothing of ours. So it calls run, a function
// with the argument a, as compiled code calls it: a is in AX. A call by name would go through a
// wrapper, which the race detector instruments.
TEXT ·cloneJob(SB),NOSPLIT,$0-64
	MOVQ	trap+0(FP), AX
	MOVQ	arg1+8(FP), DI
	MOVQ	arg2+16(FP), SI
	MOVQ	arg3+24(FP), DX
	MOVQ	a+32(FP), R12
	MOVQ	run+40(FP), R13
	XORL	R10, R10
	XORL	R8, R8
	XORL	R9, R9
	SYSCALL
	TESTQ	AX, AX
	JEQ	child
	XORL	CX, CX
	CMPQ	AX, $0xfffffffffffff001
	JCS	made
	MOVQ	AX, CX
	NEGQ	CX
made:
	MOVQ	AX, pid+48(FP)
	MOVQ	CX, errno+56(FP)
	RET
child:
	SUBQ	$64, SP // a compiled function may store its arguments in its caller's frame
	MOVQ	R12, AX
	XORPS	X15, X15
	CALL	R13
	INT	$3 // it does not return
