#include "textflag.h"

// func cloneJob(trap, arg1, arg2, arg3 uintptr, a *spawnArea) (pid uintptr, errno uintptr)
//
// The child begins on a stack of its own. Nothing that the parent has on its stack is there.
TEXT ·cloneJob(SB),NOSPLIT,$0-56
	MOVQ	trap+0(FP), AX
	MOVQ	arg1+8(FP), DI
	MOVQ	arg2+16(FP), SI
	MOVQ	arg3+24(FP), DX
	MOVQ	a+32(FP), R12
	XORL	R10, R10
	XORL	R8, R8
	XORL	R9, R9
	SYSCALL
	TESTQ	AX, AX
	JEQ	child
	CMPQ	AX, $0xfffffffffffff001
	JHI	failed
	MOVQ	AX, pid+40(FP)
	MOVQ	$0, errno+48(FP)
	RET
failed:
	NEGQ	AX
	MOVQ	$0, pid+40(FP)
	MOVQ	AX, errno+48(FP)
	RET
child:
	SUBQ	$32, SP
	MOVQ	R12, 0(SP)
	CALL	·execJob(SB)
	INT	$3 // execJob does not return
