// First-word fall-through FIFO in distributed RAM. A write while full and a read while empty are ignored.
module cec_fifo #(
    parameter WIDTH = 512,
    parameter LOG2 = 5
) (
    input  wire             clk,
    input  wire             rst,
    input  wire             push,
    input  wire [WIDTH-1:0] din,
    input  wire             pop,
    output wire [WIDTH-1:0] dout,
    output reg  [LOG2:0]    count
);
    (* ram_style = "distributed" *) reg [WIDTH-1:0] mem [0:(1 << LOG2)-1];
    reg [LOG2-1:0] head, tail;
    wire do_push = push & ~count[LOG2];
    wire do_pop = pop & (count != 0);
    assign dout = mem[head];

    always @(posedge clk) begin
        if (do_push) mem[tail] <= din;
        if (rst) begin
            head <= 0;
            tail <= 0;
            count <= 0;
        end else begin
            if (do_push) tail <= tail + 1'b1;
            if (do_pop) head <= head + 1'b1;
            count <= count + do_push - do_pop;
        end
    end
endmodule
